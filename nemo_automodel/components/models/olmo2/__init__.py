from nemo_automodel.components.models.olmo2.model import Olmo2ForCausalLM, Olmo2ForSequenceClassification

__all__ = ["Olmo2ForCausalLM", "Olmo2ForSequenceClassification"]
