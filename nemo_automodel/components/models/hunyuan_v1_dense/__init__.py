from nemo_automodel.components.models.hunyuan_v1_dense.model import (
    HunYuanDenseV1ForCausalLM,
    HunYuanDenseV1ForSequenceClassification,
)

__all__ = ["HunYuanDenseV1ForCausalLM", "HunYuanDenseV1ForSequenceClassification"]
