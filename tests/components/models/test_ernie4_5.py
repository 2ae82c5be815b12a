"""ERNIE 4.5 equals transformers' class, with the features that its configs switch on."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Ernie4_5Config

from nemo_automodel.verify import assert_verified

CONFIGS: dict[str, dict[str, Any]] = {
    "as released": {},
    "changed": {
        "use_bias": True,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-3,
        "head_dim": 32,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    config = Ernie4_5Config(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, **CONFIGS[name])
    config.save_pretrained(tmp_path)
    assert_verified("Ernie4_5ForCausalLM", config=tmp_path)
