from nemo_automodel.components.models.gemma3.model import Gemma3ForCausalLM, Gemma3TextForSequenceClassification

__all__ = ["Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"]
