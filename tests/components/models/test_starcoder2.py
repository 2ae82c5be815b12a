"""StarCoder2 equals transformers' class, with the features that its configs switch on."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Starcoder2Config, Starcoder2ForSequenceClassification

from nemo_automodel.verify import assert_verified
from tests.conftest import assert_near, tiny, tokens, twins

CONFIGS: dict[str, dict[str, Any]] = {
    "as released": {"rope_parameters": {"rope_type": "default", "rope_theta": 999999.4420358813}},
    "changed": {
        "sliding_window": 6,
        "use_bias": False,
        "tie_word_embeddings": False,
        "norm_epsilon": 1e-3,
        "hidden_act": "relu",
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    config = Starcoder2Config(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, **CONFIGS[name])
    config.save_pretrained(tmp_path)
    assert_verified("Starcoder2ForCausalLM", config=tmp_path)


def test_classifier() -> None:
    config = tiny(Starcoder2Config, num_labels=3, pad_token_id=0)
    theirs, ours = twins(Starcoder2ForSequenceClassification, config)
    assert_near(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)
