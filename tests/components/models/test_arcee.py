"""Arcee equals transformers' class."""

from pathlib import Path
from typing import Any

import pytest
from transformers import ArceeConfig, ArceeForSequenceClassification

from nemo_automodel.verify import assert_verified
from tests.conftest import assert_near, tiny, tokens, twins

CONFIGS: dict[str, dict[str, Any]] = {
    "GQA and YaRN": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 20.0,
            "original_max_position_embeddings": 4096,
            "beta_slow": 1.0,
            "mscale": 1.0,
        },
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "biases, tied, heads of another size": {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rms_norm_eps": 0.001,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    ArceeConfig(num_hidden_layers=2, **CONFIGS[name]).save_pretrained(tmp_path)
    assert_verified("ArceeForCausalLM", config=tmp_path)


def test_classifier() -> None:
    config = tiny(ArceeConfig, num_labels=3, pad_token_id=0)
    theirs, ours = twins(ArceeForSequenceClassification, config)
    assert_near(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)
