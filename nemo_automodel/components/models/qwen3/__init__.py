from nemo_automodel.components.models.qwen3.model import Qwen3ForCausalLM, Qwen3ForSequenceClassification

__all__ = ["Qwen3ForCausalLM", "Qwen3ForSequenceClassification"]
