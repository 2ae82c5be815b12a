"""Granite 4's checkpoints hold gate and up in one tensor, one after the other, and call the MLP `shared_mlp`."""

from nemo_automodel.components.layout import Fusion, concatenated
from nemo_automodel.components.models.common.combined_projection.state_dict_adapter import (
    CombinedProjectionStateDictAdapter,
)


class GraniteMoeHybridStateDictAdapter(CombinedProjectionStateDictAdapter):
    """Separate query, key and value; `input_linear` and `output_linear`."""

    renames = (("mlp", "shared_mlp"), ("down_proj", "output_linear"))

    def gate_up_rows(self, fusion: Fusion) -> Fusion:
        return concatenated(fusion, "input_linear")
