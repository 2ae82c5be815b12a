from nemo_automodel.components.models.arcee.model import ArceeForCausalLM, ArceeForSequenceClassification

__all__ = ["ArceeForCausalLM", "ArceeForSequenceClassification"]
