"""Gemma equals transformers' class."""

from pathlib import Path
from typing import Any

import pytest
from transformers import GemmaConfig

from nemo_automodel.verify import assert_verified

CONFIGS: dict[str, dict[str, Any]] = {
    "as checkpoints have it": {"num_key_value_heads": 1},
    "other features": {"attention_bias": True, "head_dim": 128, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    GemmaConfig(**{**sizes, **CONFIGS[name]}).save_pretrained(tmp_path)
    assert_verified("GemmaForCausalLM", config=tmp_path)
