"""GLM 4's checkpoints hold `[gate | up]` in one tensor, and queries and keys for RoPE of neighbouring channels."""

from nemo_automodel.components.layout import Fusion, concatenated, interleaved
from nemo_automodel.components.models.common.combined_projection.combined_qkv import head_dim_of
from nemo_automodel.components.models.common.combined_projection.state_dict_adapter import (
    CombinedProjectionStateDictAdapter,
)
from nemo_automodel.components.models.common.rope import rope_field


class Glm4StateDictAdapter(CombinedProjectionStateDictAdapter):
    """The checkpoints' order of rows."""

    def qkv_rows(self, fusion: Fusion) -> Fusion:
        share = rope_field(self.config, "partial_rotary_factor", 1.0)
        return interleaved(fusion, int(head_dim_of(self.config) * share))

    def gate_up_rows(self, fusion: Fusion) -> Fusion:
        return concatenated(fusion, "gate_up_proj")
