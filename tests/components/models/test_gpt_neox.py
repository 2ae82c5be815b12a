"""GPT-NeoX equals transformers' class, with the features that its configs switch on."""

from pathlib import Path
from typing import Any

import pytest
from transformers import GPTNeoXConfig, GPTNeoXForSequenceClassification

from nemo_automodel._transformers import registry
from nemo_automodel.verify import assert_verified
from tests.conftest import assert_near, tiny, tokens, twins

CONFIGS: dict[str, dict[str, Any]] = {
    "Pythia": {"pad_token_id": 1},
    "changed": {
        "use_parallel_residual": False,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "layer_norm_eps": 1e-3,
        "hidden_act": "gelu_fast",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 1.0},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    config = GPTNeoXConfig(num_hidden_layers=2, num_attention_heads=8, **CONFIGS[name])
    config.save_pretrained(tmp_path)
    assert_verified("GPTNeoXForCausalLM", config=tmp_path)


def test_classifier() -> None:
    config = tiny(GPTNeoXConfig, num_key_value_heads=4, num_labels=3, pad_token_id=0)
    theirs, ours = twins(GPTNeoXForSequenceClassification, config)
    assert_near(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)


def test_refuses_heads_that_transformers_does_not_read() -> None:
    model_class = registry.resolve("GPTNeoXForCausalLM")
    assert model_class is not None
    for field, value in (("num_key_value_heads", 2), ("head_dim", 16)):
        with pytest.raises(ValueError, match=f"{field}={value}"):
            model_class.decoder_spec(GPTNeoXConfig(**{field: value}))
