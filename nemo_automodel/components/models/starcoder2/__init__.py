from nemo_automodel.components.models.starcoder2.model import Starcoder2ForCausalLM, Starcoder2ForSequenceClassification

__all__ = ["Starcoder2ForCausalLM", "Starcoder2ForSequenceClassification"]
