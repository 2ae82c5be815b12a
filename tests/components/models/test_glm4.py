"""GLM 4 equals transformers' class, with the features that its configs switch on."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Glm4Config, Glm4ForSequenceClassification

from nemo_automodel.verify import assert_verified
from tests.conftest import assert_near, tiny, tokens, twins

CONFIGS: dict[str, dict[str, Any]] = {
    "as released": {"num_key_value_heads": 2},
    "changed": {
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-3,
        "head_dim": 64,
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 1.0},
    },
    "YaRN": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    config = Glm4Config(num_hidden_layers=2, num_attention_heads=8, **CONFIGS[name])
    config.save_pretrained(tmp_path)
    assert_verified("Glm4ForCausalLM", config=tmp_path)


def test_classifier() -> None:
    config = tiny(Glm4Config, num_labels=3, pad_token_id=0)
    theirs, ours = twins(Glm4ForSequenceClassification, config)
    assert_near(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)
