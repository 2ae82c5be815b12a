"""GPT-NeoX's checkpoints hold queries, keys and values in one tensor, by heads as here, under names of their own."""

from nemo_automodel.components.layout import Fusion, stored_as
from nemo_automodel.components.models.common.combined_projection.state_dict_adapter import (
    CombinedProjectionStateDictAdapter,
)


class GPTNeoXStateDictAdapter(CombinedProjectionStateDictAdapter):
    """The checkpoints' names; an MLP without a gate."""

    fuses_gate_up = False
    renames = (
        ("model.norm", "model.final_layer_norm"),
        ("model.embed_tokens", "model.embed_in"),
        ("self_attn.o_proj", "self_attn.dense"),
        ("self_attn", "attention"),
        ("mlp.up_proj", "mlp.dense_h_to_4h"),
        ("mlp.down_proj", "mlp.dense_4h_to_h"),
        ("model", "gpt_neox"),
        ("lm_head", "embed_out"),
    )

    def qkv_rows(self, fusion: Fusion) -> Fusion:
        return stored_as(fusion, "query_key_value")
