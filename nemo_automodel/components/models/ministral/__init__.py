from nemo_automodel.components.models.ministral.model import MinistralForCausalLM, MinistralForSequenceClassification

__all__ = ["MinistralForCausalLM", "MinistralForSequenceClassification"]
