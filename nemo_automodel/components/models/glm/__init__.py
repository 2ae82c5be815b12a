from nemo_automodel.components.models.glm.model import GlmForCausalLM, GlmForSequenceClassification

__all__ = ["GlmForCausalLM", "GlmForSequenceClassification"]
