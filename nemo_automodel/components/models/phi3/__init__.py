from nemo_automodel.components.models.phi3.model import Phi3ForCausalLM, Phi3ForSequenceClassification

__all__ = ["Phi3ForCausalLM", "Phi3ForSequenceClassification"]
