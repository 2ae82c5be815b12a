from nemo_automodel.components.models.seed_oss.model import SeedOssForCausalLM, SeedOssForSequenceClassification

__all__ = ["SeedOssForCausalLM", "SeedOssForSequenceClassification"]
