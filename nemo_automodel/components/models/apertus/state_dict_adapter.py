"""Apertus's checkpoints hold the standard separate projections; there is no gate."""

from nemo_automodel.components.models.common.combined_projection.state_dict_adapter import (
    CombinedProjectionStateDictAdapter,
)


class ApertusStateDictAdapter(CombinedProjectionStateDictAdapter):
    """The standard adapter, for an MLP without a gate."""

    fuses_gate_up = False
