"""Hunyuan's checkpoints hold the standard separate projections, and norms of heads under other names."""

from nemo_automodel.components.models.common.combined_projection.state_dict_adapter import (
    CombinedProjectionStateDictAdapter,
)


class HunYuanDenseV1StateDictAdapter(CombinedProjectionStateDictAdapter):
    """The standard adapter, with two names."""

    renames = (("q_norm", "query_layernorm"), ("k_norm", "key_layernorm"))
