"""Seed-OSS equals transformers' class."""

from pathlib import Path
from typing import Any

import pytest
from transformers import SeedOssConfig, SeedOssForSequenceClassification

from nemo_automodel.verify import assert_verified
from tests.conftest import assert_near, tiny, tokens, twins

CONFIGS: dict[str, dict[str, Any]] = {
    "as Seed-OSS-36B": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0},
    },
    "other biases, tied": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "attention_bias": False,
        "attention_out_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rms_norm_eps": 0.001,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
    },
    "dropout": {"num_attention_heads": 8, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    SeedOssConfig(num_hidden_layers=2, **CONFIGS[name]).save_pretrained(tmp_path)
    assert_verified("SeedOssForCausalLM", config=tmp_path)


def test_classifier() -> None:
    config = tiny(SeedOssConfig, num_labels=3, pad_token_id=0)
    theirs, ours = twins(SeedOssForSequenceClassification, config)
    assert_near(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)
