"""Nemotron equals transformers' class."""

from pathlib import Path
from typing import Any

import pytest
from transformers import NemotronConfig, NemotronForSequenceClassification

from nemo_automodel.verify import assert_verified
from tests.conftest import assert_near, tiny, tokens, twins

CONFIGS: dict[str, dict[str, Any]] = {
    "GQA": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128},
    "biases, tied, another share": {
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "norm_eps": 0.001,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    },
    "scaled RoPE": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0, "partial_rotary_factor": 0.5},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    NemotronConfig(num_hidden_layers=2, **CONFIGS[name]).save_pretrained(tmp_path)
    assert_verified("NemotronForCausalLM", config=tmp_path)


def test_classifier() -> None:
    config = tiny(NemotronConfig, num_labels=3, pad_token_id=0)
    theirs, ours = twins(NemotronForSequenceClassification, config)
    assert_near(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)
