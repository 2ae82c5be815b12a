from nemo_automodel.components.models.qwen2.model import Qwen2ForCausalLM, Qwen2ForSequenceClassification

__all__ = ["Qwen2ForCausalLM", "Qwen2ForSequenceClassification"]
