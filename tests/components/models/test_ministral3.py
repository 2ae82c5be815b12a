"""Ministral 3 equals transformers' class."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Ministral3Config, Ministral3ForSequenceClassification

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.verify import assert_verified
from tests.conftest import assert_near, tiny, tokens, twins

CONFIGS: dict[str, dict[str, Any]] = {
    "YaRN, growing queries": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "windows, tied, more growth": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "rms_norm_eps": 0.001,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 262144,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.9,
        },
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    Ministral3Config(num_hidden_layers=2, **CONFIGS[name]).save_pretrained(tmp_path)
    assert_verified("Ministral3ForCausalLM", config=tmp_path)


def test_classifier() -> None:
    config = tiny(Ministral3Config, num_labels=3, pad_token_id=0)
    theirs, ours = twins(Ministral3ForSequenceClassification, config)
    assert_near(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)


def test_refused_where_the_growth_is_not_given() -> None:
    config = tiny(Ministral3Config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="llama_4_scaling_beta=None"):
        NeMoAutoModelForCausalLM.from_config(config)
