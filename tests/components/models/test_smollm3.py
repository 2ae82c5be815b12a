"""SmolLM3 equals transformers' class."""

from pathlib import Path
from typing import Any

import pytest
from transformers import SmolLM3Config

from nemo_automodel.verify import assert_verified

CONFIGS: dict[str, dict[str, Any]] = {
    "as checkpoints have it": {"rope_parameters": {"rope_theta": 5000000.0, "rope_type": "default"}},
    "other features": {
        "attention_bias": True,
        "mlp_bias": True,
        "no_rope_layer_interval": 2,
        "rope_parameters": {
            "attention_factor": 1.2,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "rope_type": "yarn",
        },
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "use_sliding_window": True,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    SmolLM3Config(**{**sizes, **CONFIGS[name]}).save_pretrained(tmp_path)
    assert_verified("SmolLM3ForCausalLM", config=tmp_path)
