"""Qwen2 equals transformers' class; `test_parity.py` looks at it closer, and in the default suite."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config

from nemo_automodel.verify import assert_verified

pytestmark = pytest.mark.slow
CONFIGS: dict[str, dict[str, Any]] = {
    "as Qwen2.5": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "windows, YaRN": {
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    config = Qwen2Config(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, **CONFIGS[name])
    config.save_pretrained(tmp_path)
    assert_verified("Qwen2ForCausalLM", config=tmp_path)
