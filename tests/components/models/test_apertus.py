"""Apertus equals transformers' class."""

from pathlib import Path
from typing import Any

import pytest
from transformers import ApertusConfig

from nemo_automodel.verify import assert_verified

CONFIGS: dict[str, dict[str, Any]] = {
    "xIELU": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "biases, tied, another activation": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rms_norm_eps": 0.001,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    ApertusConfig(num_hidden_layers=2, **CONFIGS[name]).save_pretrained(tmp_path)
    assert_verified("ApertusForCausalLM", config=tmp_path)
