"""EXAONE 4 equals transformers' class."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Exaone4Config, Exaone4ForSequenceClassification

from nemo_automodel.verify import assert_verified
from tests.conftest import assert_near, tiny, tokens, twins

CONFIGS: dict[str, dict[str, Any]] = {
    "as the 32B": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
    },
    "as the 1.2B": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "sliding_window": None,
        "layer_types": ["full_attention", "full_attention"],
        "tie_word_embeddings": True,
        "rms_norm_eps": 0.001,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    Exaone4Config(num_hidden_layers=2, **CONFIGS[name]).save_pretrained(tmp_path)
    assert_verified("Exaone4ForCausalLM", config=tmp_path)


def test_classifier() -> None:
    config = tiny(Exaone4Config, num_labels=3, pad_token_id=0)
    theirs, ours = twins(Exaone4ForSequenceClassification, config)
    assert_near(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)
