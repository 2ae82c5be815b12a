"""Phi-3's checkpoints hold `[Q | K | V]` and `[gate | up]`, each in one tensor."""

from nemo_automodel.components.layout import Fusion, concatenated
from nemo_automodel.components.models.common.combined_projection.state_dict_adapter import (
    CombinedProjectionStateDictAdapter,
)


class Phi3StateDictAdapter(CombinedProjectionStateDictAdapter):
    """Both fused projections, in the checkpoints' order of rows."""

    def qkv_rows(self, fusion: Fusion) -> Fusion:
        return concatenated(fusion, "qkv_proj")

    def gate_up_rows(self, fusion: Fusion) -> Fusion:
        return concatenated(fusion, "gate_up_proj")
