"""ERNIE 4.5's checkpoints hold queries and keys for RoPE of neighbouring channels."""

from nemo_automodel.components.models.common.combined_projection.state_dict_adapter import (
    InterleavedRopeStateDictAdapter,
)


class Ernie4_5StateDictAdapter(InterleavedRopeStateDictAdapter):
    """The standard adapter for them."""
