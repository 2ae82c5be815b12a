"""Gemma3 equals transformers' class."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3TextConfig

from nemo_automodel.verify import assert_verified

CONFIGS: dict[str, dict[str, Any]] = {
    "as checkpoints have it": {"num_hidden_layers": 6, "sliding_window": 512},
    "other features": {
        "num_key_value_heads": 4,
        "attention_bias": True,
        "final_logit_softcapping": 20.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 168,
        "rope_parameters": {
            "full_attention": {"factor": 8.0, "rope_theta": 1000000.0, "rope_type": "linear"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "tie_word_embeddings": False,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    Gemma3TextConfig(**{**sizes, **CONFIGS[name]}).save_pretrained(tmp_path)
    assert_verified("Gemma3ForCausalLM", config=tmp_path)
