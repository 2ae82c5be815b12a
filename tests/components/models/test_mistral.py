"""Mistral equals transformers' class: with the fields it was written from, and with those changed that it reads."""

from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig, MistralForSequenceClassification

from nemo_automodel.verify import assert_verified
from tests.conftest import assert_near, tiny, tokens, twins

CONFIGS: dict[str, dict[str, Any]] = {
    "as given": {
        "rms_norm_eps": 1e-05,
    },
    "changed": {
        "rms_norm_eps": 0.001,
        "sliding_window": None,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    config = MistralConfig(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, **CONFIGS[name])
    config.save_pretrained(tmp_path)
    assert_verified("MistralForCausalLM", config=tmp_path)


def test_classifier() -> None:
    config = tiny(MistralConfig, num_labels=3, pad_token_id=0)
    theirs, ours = twins(MistralForSequenceClassification, config)
    assert_near(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)
