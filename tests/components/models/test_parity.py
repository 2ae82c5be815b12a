"""Llama and Qwen2 equal transformers' own classes: logits, loss and every gradient, fp32."""

import random

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.conftest import assert_near, assert_same_step, tiny, tokens, twins, uncompiled

FAMILIES = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")

SHAPES = {
    "llama": {
        "mha": {"num_key_value_heads": 4},
        "kv heads unset": {"num_key_value_heads": None},
        "gqa": {"num_attention_heads": 6, "hidden_size": 48},
        "mqa": {"num_key_value_heads": 1},
        "head_dim None": {"head_dim": None},
        "head_dim above hidden/heads": {"head_dim": 10},
        "head_dim below hidden/heads": {"head_dim": 6, "num_key_value_heads": 1},
        "attention bias": {"attention_bias": True},
        "mlp bias, odd intermediate": {"mlp_bias": True, "intermediate_size": 37},
        "all biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        "padding id": {"pad_token_id": 0},
    },
    "qwen2": {
        "mha": {"num_key_value_heads": 4},
        "gqa, tied": {"tie_word_embeddings": True},
        "mqa, odd intermediate": {"num_key_value_heads": 1, "intermediate_size": 27},
        "head_dim above hidden/heads": {"head_dim": 12},
    },
}


def random_shape(seed: int) -> tuple[str, dict]:
    draw = random.Random(seed)
    kv_heads, group, head_dim = draw.choice((1, 2, 3)), draw.choice((1, 2, 3)), draw.choice((None, 4, 6, 14))
    shape = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * group,
        "hidden_size": kv_heads * group * draw.choice((4, 8)),
        "intermediate_size": draw.randrange(5, 40),
        "hidden_act": draw.choice(("silu", "gelu", "gelu_pytorch_tanh", "relu", "quick_gelu")),
        "tie_word_embeddings": draw.random() < 0.5,
        "rms_norm_eps": draw.choice((1e-6, 1e-2)),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice((100.0, 1e6))},
    }
    family = draw.choice(("llama", "qwen2"))
    if family == "llama":
        shape |= {"attention_bias": draw.random() < 0.5, "mlp_bias": draw.random() < 0.5}
    return family, shape | ({"head_dim": head_dim} if head_dim else {})


CASES = [pytest.param(f, s, id=f"{f}-{n}") for f, shapes in SHAPES.items() for n, s in shapes.items()]
CASES += [pytest.param(*random_shape(seed), id=f"random-{seed}") for seed in range(12)]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "shape"), CASES)
def test_logits_loss_and_gradients(family, shape, attn):
    hf_class, config_class = FAMILIES[family]
    hf, ours = twins(hf_class, tiny(config_class, attn, **shape))
    ids = tokens(2, 11)
    assert_same_step(hf, ours, input_ids=ids, labels=ids)


def test_qwen2_head_dim_none_means_unset():
    hf, reference = twins(Qwen2ForCausalLM, tiny(Qwen2Config))
    ours = type(reference)(tiny(Qwen2Config, head_dim=None))  # transformers' class fails on it
    ours.load_state_dict(hf.state_dict())
    assert_same_step(hf, ours, input_ids=tokens(1, 7), labels=tokens(1, 7))


@pytest.mark.parametrize("act", ["gelu_new", "relu2", "mish", "swish", "leaky_relu", "tanh", "linear"])
def test_activations(act):
    hf, ours = twins(LlamaForCausalLM, tiny(hidden_act=act))
    assert_same_step(hf, ours, input_ids=tokens(1, 7), labels=tokens(1, 7))


ROPE = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-mscale": {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.3},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 5.0, 7.0],
    },
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


def rope_config(name: str, config_class: type = LlamaConfig, **changes):
    parameters = {"rope_type": name.partition("-")[0], "rope_theta": 50.0, **ROPE[name]}
    return tiny(config_class, rope_parameters=parameters, max_position_embeddings=16, **changes)


def test_every_rope_type_is_here():
    assert {name.partition("-")[0] for name in ROPE} == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("name", ROPE)
def test_rope_within_and_beyond_the_original_length_and_back(name, config_class):
    hf_class = LlamaForCausalLM if config_class is LlamaConfig else Qwen2ForCausalLM
    hf, ours = twins(hf_class, rope_config(name, config_class))
    tables = []
    for length in (12, 40, 15, 50, 12):
        ids = tokens(2, length)
        assert_same_step(hf, ours, input_ids=ids, labels=ids)
        tables.append(ours.model.rotary_emb.inv_freq.clone())
    grows = name in ("dynamic", "longrope")
    assert torch.equal(tables[0], tables[1]) != grows
    assert torch.equal(tables[0], tables[2])
    assert torch.equal(tables[0], tables[4])


def test_rope_in_the_names_of_older_configs():
    config = tiny(rope_theta=77.0, rope_scaling={"type": "linear", "factor": 2.5})
    hf, ours = twins(LlamaForCausalLM, config)
    assert_same_step(hf, ours, input_ids=tokens(1, 9), labels=tokens(1, 9))
    assert ours.model.rotary_emb.inv_freq[0] == 1 / 2.5


SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "num_hidden_layers": 3}
VARIANTS = {"llama": {}, "qwen2": {}, "qwen2-sliding": SLIDING}


def variant_twins(variant: str, attn: str):
    hf_class, config_class = FAMILIES[variant.partition("-")[0]]
    return twins(hf_class, tiny(config_class, attn, **VARIANTS[variant]))


def assert_same(attn, hf, ours, real=None, **inputs):
    """One training step; for flex the forward pass alone, since torch has no backward of it on the CPU."""
    if attn != "flex_attention":
        assert_same_step(hf, ours, real, **inputs)
        return
    with torch.no_grad(), uncompiled(attn):
        expected, actual = hf(**inputs), ours(**inputs)
    real = slice(None) if real is None else real.bool()
    assert_near(actual.logits[real], expected.logits[real], what="logits")
    assert_near(actual.loss, expected.loss, what="loss")


@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
class TestMasks:
    @pytest.mark.parametrize("side", ["none", "left", "right"])
    def test_padding(self, variant, attn, side):
        hf, ours = variant_twins(variant, attn)
        ids, mask = tokens(3, 13), torch.ones(3, 13, dtype=torch.long)
        if side != "none":
            for row, padding in enumerate((0, 3, 7)):
                mask[row, slice(padding) if side == "left" else slice(13 - padding, None)] = 0
        labels = ids.masked_fill(mask == 0, -100)
        assert_same(attn, hf, ours, mask, input_ids=ids, attention_mask=mask, labels=labels)

    def test_packed_documents(self, variant, attn):
        hf, ours = variant_twins(variant, attn)
        ids = tokens(2, 13)
        positions = torch.cat([torch.arange(6), torch.arange(7)]).expand(2, -1)
        # transformers looks for packed documents only where no cache is made
        assert_same(attn, hf, ours, input_ids=ids, position_ids=positions, labels=ids, use_cache=False)

        changed = ids.clone()
        changed[:, :6] = (changed[:, :6] + 1) % 61
        with torch.no_grad(), uncompiled(attn):
            for options in ({}, {"use_cache": False}, {"use_cache": True}):
                before = ours(ids, position_ids=positions, **options).logits
                after = ours(changed, position_ids=positions, **options).logits
                assert torch.equal(before[:, 6:], after[:, 6:]), options
                assert not torch.equal(before[:, :6], after[:, :6])
                alone = ours(ids[:, 6:], **options).logits
                assert_near(before[:, 6:], alone, what=f"{options}")


@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
def test_sliding_layers_see_the_window_and_no_more(attn):
    config = tiny(Qwen2Config, attn, **SLIDING | {"max_window_layers": 0, "num_hidden_layers": 1})
    _, ours = twins(Qwen2ForCausalLM, config)
    ids = tokens(1, 12)
    changed = ids.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 61
    with torch.no_grad(), uncompiled(attn):
        moved = (ours(ids).logits != ours(changed).logits).any(-1)[0].nonzero().flatten()
    assert moved.tolist() == [3, 4, 5, 6]


OPTIONS = {
    "hidden states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "last logits": {"logits_to_keep": 3},
    "picked logits": {"logits_to_keep": torch.tensor([0, 4, 5])},
    "tuple": {"return_dict": False},
    "items in batch": {"num_items_in_batch": 7},
    "items in batch, tensor": {"num_items_in_batch": torch.tensor(7)},
    "shifted labels": {"shift_labels": tokens(2, 9, seed=5)},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_forward(family, name):
    hf_class, config_class = FAMILIES[family]
    hf, ours = twins(hf_class, tiny(config_class, "eager"))
    ids = tokens(2, 9)
    labels = None if "logits" in name else ids
    expected, actual = (m(ids, labels=labels, use_cache=False, **OPTIONS[name]) for m in (hf, ours))
    assert type(actual) is type(expected)
    expected, actual = (x if isinstance(x, tuple) else x.to_tuple() for x in (expected, actual))
    flat = [[t for entry in x for t in (entry if isinstance(entry, tuple) else (entry,))] for x in (expected, actual)]
    assert len(flat[0]) == len(flat[1])
    for reference, value in zip(*flat, strict=True):
        assert_near(value, reference)


def test_inputs_embeds():
    hf, ours = twins(LlamaForCausalLM, tiny())
    embeds, labels = torch.randn(2, 9, 32), tokens(2, 9)
    gradients = []
    for model in (hf, ours):
        leaf = embeds.clone().requires_grad_()
        model(inputs_embeds=leaf, labels=labels).loss.backward()
        gradients.append(leaf.grad)
    assert_near(gradients[1], gradients[0])
    for wrong in ({}, {"input_ids": labels, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            ours(**wrong)


def test_other_attention_functions_are_given_what_transformers_gives_them():
    """Flash attention, for one, finds the window and the packed documents in these."""
    given: list[dict] = []

    def spy(module, query, key, value, mask, **kwargs):
        kept = {name: kwargs[name] for name in ("scaling", "dropout", "sliding_window", "num_items_in_batch")}
        given.append(kept | {"positions": kwargs["position_ids"].tolist(), "causal": module.is_causal, "mask": mask})
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("spy", spy)
    changes = SLIDING | {"attention_dropout": 0.25}
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    for model in twins(Qwen2ForCausalLM, tiny(Qwen2Config, "spy", **changes)):
        model.train()(tokens(1, 9), position_ids=positions, num_items_in_batch=3)
    assert [call["sliding_window"] for call in given] == [None, 4, 4] * 2
    assert given[:3] == given[3:]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family, reentrant):
    hf_class, config_class = FAMILIES[family]
    # dropout, drawn alike by transformers' eager attention and, the second time, by the recomputed forward
    hf, ours = twins(hf_class, tiny(config_class, "eager", attention_dropout=0.3))
    ids, runs, calls = tokens(2, 9), [], []
    torch.manual_seed(0)
    expected = hf.train()(ids, labels=ids).loss
    ours.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ours.train().zero_grad()
        torch.manual_seed(0)
        loss = ours(ids, labels=ids).loss
        loss.backward()
        runs.append([loss, *(p.grad.clone() for p in ours.parameters())])
    assert_near(runs[0][0], expected)
    assert len(calls) == 3, "one forward, then a forward and its recomputation"
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
