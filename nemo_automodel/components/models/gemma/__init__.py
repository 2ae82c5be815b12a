from nemo_automodel.components.models.gemma.model import GemmaForCausalLM, GemmaForSequenceClassification

__all__ = ["GemmaForCausalLM", "GemmaForSequenceClassification"]
