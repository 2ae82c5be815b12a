"""Gemma2's checkpoints hold the standard separate projections."""

from nemo_automodel.components.models.common.combined_projection.state_dict_adapter import (
    CombinedProjectionStateDictAdapter,
)


class Gemma2StateDictAdapter(CombinedProjectionStateDictAdapter):
    """The standard adapter."""
