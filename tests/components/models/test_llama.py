"""Llama equals transformers' class; `test_parity.py` looks at it closer, and in the default suite."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from nemo_automodel.verify import assert_verified

pytestmark = pytest.mark.slow
CONFIGS: dict[str, dict[str, Any]] = {
    "as Llama 3.2": {
        "num_hidden_layers": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "biases, untied": {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    LlamaConfig(num_attention_heads=8, num_key_value_heads=2, **CONFIGS[name]).save_pretrained(tmp_path)
    assert_verified("LlamaForCausalLM", config=tmp_path)
