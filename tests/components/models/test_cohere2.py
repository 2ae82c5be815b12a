"""Cohere 2 equals transformers' class, with the features that its configs switch on."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Cohere2Config

from nemo_automodel.verify import assert_verified

CONFIGS: dict[str, dict[str, Any]] = {
    "as released": {"logit_scale": 0.25, "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
    "changed": {
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention"],
        "num_hidden_layers": 2,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "layer_norm_eps": 1e-3,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    config = Cohere2Config(num_attention_heads=8, num_key_value_heads=2, **{"num_hidden_layers": 4, **CONFIGS[name]})
    config.save_pretrained(tmp_path)
    assert_verified("Cohere2ForCausalLM", config=tmp_path)
