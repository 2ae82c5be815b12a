"""Ministral equals transformers' class."""

from pathlib import Path
from typing import Any

import pytest
from transformers import MinistralConfig, MinistralForSequenceClassification

from nemo_automodel.verify import assert_verified
from tests.conftest import assert_near, tiny, tokens, twins

CONFIGS: dict[str, dict[str, Any]] = {
    "windows on some layers": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "sliding_window": 32768,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000000.0},
    },
    "windows on all layers, YaRN, tied": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 512,
        "sliding_window": 4096,
        "layer_types": ["sliding_attention", "sliding_attention"],
        "tie_word_embeddings": True,
        "rms_norm_eps": 0.001,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    MinistralConfig(num_hidden_layers=2, **CONFIGS[name]).save_pretrained(tmp_path)
    assert_verified("MinistralForCausalLM", config=tmp_path)


def test_classifier() -> None:
    config = tiny(MinistralConfig, head_dim=8, num_labels=3, pad_token_id=0)
    theirs, ours = twins(MinistralForSequenceClassification, config)
    assert_near(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)
