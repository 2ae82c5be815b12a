"""Phi-3 equals transformers' class, with the features that its configs switch on."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Phi3Config, Phi3ForCausalLM, Phi3ForSequenceClassification

from nemo_automodel.verify import assert_verified
from tests.conftest import assert_near, tiny, tokens, twins

CONFIGS: dict[str, dict[str, Any]] = {
    "Phi-4": {"rope_parameters": {"rope_theta": 250000.0, "rope_type": "default"}},
    "Phi-3-mini: a window, a part of the channels": {
        "sliding_window": 6,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5},
    },
    "Phi-4-mini: longrope, tied": {
        "hidden_size": 256,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0 + i / 8 for i in range(12)],
            "long_factor": [2.0 + i for i in range(12)],
        },
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    config = Phi3Config(num_hidden_layers=2, num_attention_heads=8, **{"num_key_value_heads": 2, **CONFIGS[name]})
    config.save_pretrained(tmp_path)
    assert_verified("Phi3ForCausalLM", config=tmp_path)


def test_classifier() -> None:
    config = tiny(Phi3Config, num_labels=3, pad_token_id=0)
    theirs, ours = twins(Phi3ForSequenceClassification, config)
    assert_near(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)


def test_generation_across_the_length_where_longrope_changes() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    config = tiny(Phi3Config, rope_parameters=rope, original_max_position_embeddings=12, pad_token_id=0)
    theirs, ours = twins(Phi3ForCausalLM, config)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    made = ours.generate(tokens(1, 8), **options)
    expected = theirs.generate(tokens(1, 8), use_cache=False, **options)  # with it, transformers 5.17 loses the context
    assert made.sequences.tolist() == expected.sequences.tolist()
    for step, logits in enumerate(expected.logits):
        assert_near(made.logits[step], logits, what=f"step {step}")


def test_a_state_dict_that_does_not_say_whose_rows_it_has_is_refused() -> None:
    theirs, ours = twins(Phi3ForCausalLM, tiny(Phi3Config, pad_token_id=0))
    for state in (theirs.state_dict(), dict(ours.state_dict())):
        with pytest.raises(ValueError, match="does not say whose it is"):
            ours.load_state_dict(state)
    ours.load_state_dict(ours.state_dict())
    assert_near(ours(tokens(1, 7)).logits, theirs(tokens(1, 7)).logits)
