"""ERNIE 4.5's checkpoints hold queries and keys for RoPE of neighbouring channels."""

from nemo_automodel.components.layout import Fusion, interleaved
from nemo_automodel.components.models.common.combined_projection.combined_qkv import head_dim_of
from nemo_automodel.components.models.common.combined_projection.state_dict_adapter import (
    CombinedProjectionStateDictAdapter,
)


class Ernie4_5StateDictAdapter(CombinedProjectionStateDictAdapter):
    """The standard adapter, for RoPE that turns neighbouring channels."""

    def qkv_rows(self, fusion: Fusion) -> Fusion:
        return interleaved(fusion, head_dim_of(self.config))
