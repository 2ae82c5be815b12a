from nemo_automodel.components.models.glm4.model import Glm4ForCausalLM, Glm4ForSequenceClassification

__all__ = ["Glm4ForCausalLM", "Glm4ForSequenceClassification"]
