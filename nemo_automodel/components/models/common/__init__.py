"""What every dense family shares."""

from nemo_automodel.components.models.common.backend import (
    BackendConfig,
    initialize_linear_module,
    initialize_rms_norm_module,
)
from nemo_automodel.components.models.common.combined_projection import (
    CombinedGateUpMLP,
    CombinedProjectionStateDictAdapter,
    CombinedQKVAttentionMixin,
    InterleavedRopeStateDictAdapter,
)
from nemo_automodel.components.models.common.hf_checkpointing_mixin import HFCheckpointingMixin

__all__ = [
    "BackendConfig",
    "CombinedGateUpMLP",
    "CombinedProjectionStateDictAdapter",
    "CombinedQKVAttentionMixin",
    "HFCheckpointingMixin",
    "InterleavedRopeStateDictAdapter",
    "initialize_linear_module",
    "initialize_rms_norm_module",
]
