"""Gemma2 equals transformers' class."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config

from nemo_automodel.verify import assert_verified

CONFIGS: dict[str, dict[str, Any]] = {
    "as checkpoints have it": {},
    "other features": {
        "attention_bias": True,
        "num_key_value_heads": 4,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "query_pre_attn_scalar": 144,
        "tie_word_embeddings": False,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    Gemma2Config(**{**sizes, **CONFIGS[name]}).save_pretrained(tmp_path)
    assert_verified("Gemma2ForCausalLM", config=tmp_path)
