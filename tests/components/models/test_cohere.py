"""Cohere equals transformers' class, with the features that its configs switch on."""

from pathlib import Path
from typing import Any

import pytest
from transformers import CohereConfig

from nemo_automodel.verify import assert_verified

CONFIGS: dict[str, dict[str, Any]] = {
    "Command R": {"logit_scale": 0.0625, "rope_parameters": {"rope_type": "default", "rope_theta": 8000000.0}},
    "Command R+": {"logit_scale": 0.8333333, "use_qk_norm": True},
    "changed": {
        "use_qk_norm": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "layer_norm_eps": 1e-3,
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    config = CohereConfig(num_hidden_layers=2, num_attention_heads=8, **{"num_key_value_heads": 2, **CONFIGS[name]})
    config.save_pretrained(tmp_path)
    assert_verified("CohereForCausalLM", config=tmp_path)
