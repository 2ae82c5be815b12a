from nemo_automodel.components.models.exaone4.model import Exaone4ForCausalLM, Exaone4ForSequenceClassification

__all__ = ["Exaone4ForCausalLM", "Exaone4ForSequenceClassification"]
