"""Granite 4 equals transformers' class where it is dense, and is refused where it is not."""

from pathlib import Path
from typing import Any

import pytest
from transformers import GraniteMoeHybridConfig

from nemo_automodel.components.models.granitemoehybrid import GraniteMoeHybridForCausalLM
from nemo_automodel.verify import assert_verified

DENSE = {"num_local_experts": 0, "layer_types": ["attention"] * 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "as released": {
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12,
        "logits_scaling": 8,
        "residual_multiplier": 0.22,
        "position_embedding_type": "rope",
        "rope_parameters": {"rope_theta": 10000000.0, "rope_type": "default"},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "changed": {
        "attention_bias": True,
        "hidden_act": "gelu",
        "position_embedding_type": "nope",
        "pad_token_id": 3,
        "num_key_value_heads": 8,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
    GraniteMoeHybridConfig(**{**sizes, **DENSE, **CONFIGS[name]}).save_pretrained(tmp_path)
    assert_verified("GraniteMoeHybridForCausalLM", config=tmp_path)


def test_refuses_what_is_not_dense() -> None:
    for field, value, message in (
        ("num_local_experts", 8, "num_local_experts=8: only dense models.*transformers' own class"),
        ("layer_types", ["attention", "mamba"], "layer_types contains 'linear_attention': only dense"),
        ("output_router_logits", True, "output_router_logits=True: a dense model"),
    ):
        config = GraniteMoeHybridConfig(num_hidden_layers=2, **{**DENSE, field: value})
        with pytest.raises(ValueError, match=message):
            GraniteMoeHybridForCausalLM.decoder_spec(config)
