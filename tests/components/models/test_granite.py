"""Granite equals transformers' class."""

from pathlib import Path
from typing import Any

import pytest
from transformers import GraniteConfig

from nemo_automodel.verify import assert_verified

CONFIGS: dict[str, dict[str, Any]] = {
    "as checkpoints have it": {
        "attention_multiplier": 0.0078125,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "rope_parameters": {"rope_theta": 10000000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
    },
    "other features": {
        "attention_bias": True,
        "attention_multiplier": 0.0078125,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "mlp_bias": True,
        "residual_multiplier": 0.22,
        "rope_parameters": {
            "attention_factor": 1.2,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "rope_type": "yarn",
        },
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    GraniteConfig(**{**sizes, **CONFIGS[name]}).save_pretrained(tmp_path)
    assert_verified("GraniteForCausalLM", config=tmp_path)
