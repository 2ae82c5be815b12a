"""Hunyuan equals transformers' class."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import HunYuanDenseV1Config, HunYuanDenseV1ForSequenceClassification
from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import HunYuanDenseV1RotaryEmbedding

from nemo_automodel.verify import assert_verified
from tests.conftest import assert_near, tiny, tokens, twins

CONFIGS: dict[str, dict[str, Any]] = {
    "alpha, tied": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0},
        "max_position_embeddings": 32768,
    },
    "plain RoPE, biases": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "attention_bias": True,
        "rms_norm_eps": 0.001,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    HunYuanDenseV1Config(num_hidden_layers=2, **CONFIGS[name]).save_pretrained(tmp_path)
    try:
        assert_verified("HunYuanDenseV1ForCausalLM", config=tmp_path)
    except AssertionError as failures:
        # transformers 5.17 forgets alpha past max_position_embeddings, and no other check may fail
        forgets = not hasattr(HunYuanDenseV1RotaryEmbedding, "compute_ntk_alpha_rope_parameters")
        if not (forgets and re.fullmatch("end to end, long inputs: .*", str(failures))):
            raise


def test_classifier() -> None:
    config = tiny(HunYuanDenseV1Config, head_dim=8, num_labels=3, pad_token_id=0)
    theirs, ours = twins(HunYuanDenseV1ForSequenceClassification, config)
    assert_near(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)
