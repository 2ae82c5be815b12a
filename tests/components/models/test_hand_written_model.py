"""The documentation's example, written from the spec's snippets alone, is a working Llama."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationMixin, LlamaForCausalLM

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers import registry
from tests.conftest import assert_near, assert_same_step, randomize, tiny, tokens

EXAMPLE = Path(__file__).parents[3] / "examples" / "hand_written_model.py"
SHAPES = {
    "gqa": {},
    "mqa, biases, odd": {
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "intermediate_size": 37,
        "head_dim": 10,
    },
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 50.0,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("hand_written_model", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del registry.MODEL_ARCH_MAPPING["HandWrittenForCausalLM"], registry._registered_classes["HandWrittenForCausalLM"]


@pytest.fixture(params=SHAPES)
def pair(request, example):
    config = tiny(**SHAPES[request.param])
    hf, ours = randomize(LlamaForCausalLM(copy.deepcopy(config))), example.ModelClass.from_config(config)
    ours.load_state_dict(hf.state_dict())
    return hf.eval(), ours.eval()


def test_it_imports_nothing_but_the_public_pattern():
    source = EXAMPLE.read_text()
    assert "models.llama import" not in source.replace("transformers.models.llama.modeling_llama import", "")
    assert "decoder" not in {word for line in source.splitlines() if "import" in line for word in line.split(".")}


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_it_equals_llama(pair, attn):
    hf, ours = pair
    hf.set_attn_implementation(attn)
    ours.set_attn_implementation(attn)
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    assert_same_step(hf, ours, input_ids=ids, labels=ids)
    labels = ids.masked_fill(mask == 0, -100)
    assert_same_step(hf, ours, mask, input_ids=ids, attention_mask=mask, labels=labels)
    assert_near(ours(ids, logits_to_keep=3).logits, hf(ids).logits[:, -3:])


def test_it_saves_and_reloads(pair, example, tmp_path):
    hf, ours = pair
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["HandWrittenForCausalLM"]
    ids = tokens(2, 9)
    loaded = [example.ModelClass.from_pretrained(tmp_path), NeMoAutoModelForCausalLM.from_pretrained(tmp_path)]
    for model in loaded:
        assert type(model) is example.ModelClass
        assert torch.equal(model(ids).logits, ours(ids).logits)
        shared = model.lm_head.weight is model.model.embed_tokens.weight
        assert shared == ours.config.tie_word_embeddings

    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs) is LlamaForCausalLM
    for name, tensor in hf.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
    options = {"dtype": "bfloat16", "attn_implementation": "eager", "backend": {"rms_norm": "torch_fp32"}}
    low = example.ModelClass.from_pretrained(tmp_path, **options)
    assert low.model.norm.fp32
    assert low.lm_head.weight.dtype == torch.bfloat16
    assert low.config._attn_implementation == "eager"
    assert torch.equal(low.model.rotary_emb.inv_freq, hf.model.rotary_emb.inv_freq)


def test_gradient_checkpointing_changes_nothing(pair):
    _, ours = pair
    ids, runs = tokens(2, 9), []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable()
        ours.train().zero_grad()
        ours(ids, labels=ids).loss.backward()
        runs.append([parameter.grad.clone() for parameter in ours.parameters()])
    assert all(layer.gradient_checkpointing for layer in ours.model.layers)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_with_generation_mixin_it_generates(pair, example):
    class Generating(example.ModelClass, GenerationMixin):
        pass

    hf, ours = pair
    model = Generating(ours.config)
    model.load_state_dict(ours.state_dict())
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.eval().generate(tokens(2, 5), **options), hf.generate(tokens(2, 5), **options))
