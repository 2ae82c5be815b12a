from nemo_automodel.components.models.ministral3.model import Ministral3ForCausalLM, Ministral3ForSequenceClassification

__all__ = ["Ministral3ForCausalLM", "Ministral3ForSequenceClassification"]
