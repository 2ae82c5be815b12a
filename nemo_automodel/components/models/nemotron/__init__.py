from nemo_automodel.components.models.nemotron.model import NemotronForCausalLM, NemotronForSequenceClassification

__all__ = ["NemotronForCausalLM", "NemotronForSequenceClassification"]
