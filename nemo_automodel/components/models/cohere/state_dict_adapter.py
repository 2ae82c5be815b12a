"""Cohere's checkpoints hold queries and keys, and the norms of their heads, for RoPE of neighbouring channels."""

from nemo_automodel.components.layout import Fusion, Interleaved, reordered
from nemo_automodel.components.models.common.combined_projection.combined_qkv import head_dim_of
from nemo_automodel.components.models.common.combined_projection.state_dict_adapter import (
    InterleavedRopeStateDictAdapter,
)


class CohereStateDictAdapter(InterleavedRopeStateDictAdapter):
    """The channels of the norms follow those of the heads."""

    def other_rows(self) -> tuple[Fusion, ...]:
        if not self.config.use_qk_norm:
            return ()
        channels = Interleaved(head_dim_of(self.config), head_dim_of(self.config))
        return reordered("q_norm", channels), reordered("k_norm", channels)
