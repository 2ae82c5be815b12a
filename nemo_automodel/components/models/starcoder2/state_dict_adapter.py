"""StarCoder2's checkpoints call the MLP's projections `c_fc` and `c_proj`."""

from nemo_automodel.components.models.common.combined_projection.state_dict_adapter import (
    CombinedProjectionStateDictAdapter,
)


class Starcoder2StateDictAdapter(CombinedProjectionStateDictAdapter):
    """Queries, keys and values apart; an MLP without a gate."""

    fuses_gate_up = False
    renames = (("mlp.up_proj", "mlp.c_fc"), ("mlp.down_proj", "mlp.c_proj"))
