from nemo_automodel.components.models.mistral.model import MistralForCausalLM, MistralForSequenceClassification

__all__ = ["MistralForCausalLM", "MistralForSequenceClassification"]
