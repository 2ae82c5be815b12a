from nemo_automodel.components.models.olmo3.model import Olmo3ForCausalLM, Olmo3ForSequenceClassification

__all__ = ["Olmo3ForCausalLM", "Olmo3ForSequenceClassification"]
