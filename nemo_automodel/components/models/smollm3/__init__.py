from nemo_automodel.components.models.smollm3.model import SmolLM3ForCausalLM, SmolLM3ForSequenceClassification

__all__ = ["SmolLM3ForCausalLM", "SmolLM3ForSequenceClassification"]
