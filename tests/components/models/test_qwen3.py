"""Qwen3 equals transformers' class: with the fields it was written from, and with those changed that it reads."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from nemo_automodel.verify import assert_verified
from tests.conftest import assert_near, tiny, tokens, twins

CONFIGS: dict[str, dict[str, Any]] = {
    "as given": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    },
    "changed": {
        "attention_bias": True,
        "rms_norm_eps": 0.001,
        "sliding_window": 6,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    config = Qwen3Config(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, **CONFIGS[name])
    config.save_pretrained(tmp_path)
    assert_verified("Qwen3ForCausalLM", config=tmp_path)


def test_classifier() -> None:
    config = tiny(Qwen3Config, num_labels=3, pad_token_id=0)
    theirs, ours = twins(Qwen3ForSequenceClassification, config)
    assert_near(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)
