"""Fused projections: one for query, key and value, one for gate and up, and the adapter to Hugging Face's names."""

from nemo_automodel.components.models.common.combined_projection.combined_mlp import CombinedGateUpMLP
from nemo_automodel.components.models.common.combined_projection.combined_qkv import CombinedQKVAttentionMixin
from nemo_automodel.components.models.common.combined_projection.state_dict_adapter import (
    CombinedProjectionStateDictAdapter,
    InterleavedRopeStateDictAdapter,
)

__all__ = [
    "CombinedGateUpMLP",
    "CombinedProjectionStateDictAdapter",
    "CombinedQKVAttentionMixin",
    "InterleavedRopeStateDictAdapter",
]
