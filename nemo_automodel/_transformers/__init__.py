"""The entry points that load any dense checkpoint, and the registry behind them."""

from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM, NeMoAutoModelForSequenceClassification

__all__ = ["NeMoAutoModelForCausalLM", "NeMoAutoModelForSequenceClassification"]
