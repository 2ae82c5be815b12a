"""GPT-NeoX equals transformers' class, with the features that its configs switch on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers import registry
from nemo_automodel.components.models.gpt_neox import GPTNeoXForCausalLM as GPTNeoX
from nemo_automodel.verify import Target, assert_verified
from nemo_automodel.verify.checks.checkpoint import real_round_trip
from nemo_automodel.verify.checks.modules import layer_by_layer
from nemo_automodel.verify.subject import Subject
from nemo_automodel.verify.target import find_target
from tests.conftest import assert_near, randomize, tiny, tokens, twins

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


def test_a_checkpoint_of_pythia_and_back(tmp_path: Path) -> None:
    config = tiny(GPTNeoXConfig, num_key_value_heads=None)
    hf = randomize(GPTNeoXForCausalLM(config))
    hf.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "embed_out.weight" in stored
    assert "lm_head.weight" not in stored
    # buffers that EleutherAI's files hold in every layer
    path = "gpt_neox.layers.0.attention."
    old = {
        "bias": torch.ones(1, 1, 4, 4).bool(),
        "masked_bias": torch.tensor(-1e9),
        "rotary_emb.inv_freq": torch.ones(2),
    }
    save_file({**stored, **{path + name: value for name, value in old.items()}}, tmp_path / "model.safetensors")
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(ours) is GPTNeoX
    assert_near(ours(tokens(1, 9)).logits, hf(tokens(1, 9)).logits)
    ours.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[key], value) for key, value in stored.items())
    with Subject(find_target(tmp_path)) as subject:
        found = real_round_trip(subject)
    assert found.passed
    assert "3 that the reference does not use either" in found.detail
    scores = registry.resolve("GPTNeoXForSequenceClassification").from_pretrained(tmp_path, num_labels=3)  # type: ignore
    assert scores.score.weight.shape == (3, 32)
    assert torch.equal(scores.model.embed_tokens.weight, hf.gpt_neox.embed_in.weight)


def test_a_wrong_head_is_named_as_it_is_stored() -> None:
    class Mutant(GPTNeoX):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            model = super().from_pretrained(*args, **kwargs)
            model.lm_head.weight = model.model.embed_tokens.weight
            return model

    with Subject(Target.of(Mutant, GPTNeoXConfig(), reference="GPTNeoXForCausalLM")) as subject:
        found = layer_by_layer(subject)
    assert "embed_out (output)" in found.detail
    assert "the head is tied to the embedding" in found.detail


def test_the_row_of_the_padding_token_learns() -> None:
    """transformers' embedding has no row for padding; Pythia's padding token, if set, is its end of text."""
    theirs, ours = twins(GPTNeoXForCausalLM, tiny(GPTNeoXConfig, num_key_value_heads=None, pad_token_id=7))
    ids = tokens(2, 9)
    ids[0, 3] = 7
    for model in (theirs, ours):
        model(ids, labels=ids).loss.backward()
    gradient = ours.model.embed_tokens.weight.grad
    assert gradient[7].abs().max() > 0
    assert_near(gradient, theirs.gpt_neox.embed_in.weight.grad)


def test_classifier() -> None:
    config = tiny(GPTNeoXConfig, num_key_value_heads=4, num_labels=3, pad_token_id=0)
    theirs, ours = twins(GPTNeoXForSequenceClassification, config)
    assert_near(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)


def test_refuses_heads_that_transformers_does_not_read() -> None:
    for field, value in (("num_key_value_heads", 2), ("head_dim", 16)):
        with pytest.raises(ValueError, match=f"{field}={value}"):
            GPTNeoX.decoder_spec(GPTNeoXConfig(**{field: value}))
