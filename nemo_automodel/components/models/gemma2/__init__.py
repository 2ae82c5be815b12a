from nemo_automodel.components.models.gemma2.model import Gemma2ForCausalLM, Gemma2ForSequenceClassification

__all__ = ["Gemma2ForCausalLM", "Gemma2ForSequenceClassification"]
