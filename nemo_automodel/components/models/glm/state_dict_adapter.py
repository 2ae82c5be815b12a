"""GLM's checkpoints hold `[gate | up]` in one tensor, and queries and keys for RoPE of neighbouring channels."""

from nemo_automodel.components.layout import Fusion, concatenated
from nemo_automodel.components.models.common.combined_projection.state_dict_adapter import (
    InterleavedRopeStateDictAdapter,
)


class GlmStateDictAdapter(InterleavedRopeStateDictAdapter):
    """The checkpoints' order of rows."""

    partial = True

    def gate_up_rows(self, fusion: Fusion) -> Fusion:
        return concatenated(fusion, "gate_up_proj")
