"""bf16 against a float64 reference, RoPE tables in fp32, and generation with and without a cache."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from nemo_automodel.components.models.common import initialize_rms_norm_module
from nemo_automodel.components.models.common.rope import RotaryEmbedding
from nemo_automodel.components.models.llama import LlamaForCausalLM as OwnLlama
from tests.components.models.test_parity import FAMILIES, ROPE, SLIDING, rope_config
from tests.conftest import assert_near, randomize, tiny, tokens, twins

LOW = (torch.bfloat16, torch.float16)


def errors(model, reference, ids) -> torch.Tensor:
    """Relative distances of logits, losses (one per token: no cancelling) and gradients from the reference's."""
    found = []
    for each in (reference, model):
        outputs = each(ids, labels=ids)
        losses = F.cross_entropy(outputs.logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        assert_near(outputs.loss.double(), losses.mean())
        each.zero_grad()
        outputs.loss.backward()
        gradients = {name: parameter.grad for name, parameter in each.named_parameters()}
        if hasattr(each, "state_dict_adapter"):
            gradients = each.state_dict_adapter.to_hf(gradients)
        flat = torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])
        found.append((outputs.logits.double(), losses, flat))
    return torch.stack([(a - b).norm() / b.norm() for b, a in zip(*found, strict=True)]).detach()


@pytest.mark.parametrize("rms_norm", ["torch", "torch_fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_no_further_from_float64_than_transformers(family, rms_norm):
    hf_class, config_class = FAMILIES[family]
    config = tiny(config_class, hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    pairs = []
    for seed in range(6):
        exact, ours = twins(hf_class, config, seed, backend={"rms_norm": rms_norm})
        low = copy.deepcopy(exact).bfloat16()
        low.model.rotary_emb = copy.deepcopy(exact.model.rotary_emb)  # as from_pretrained leaves it, in fp32
        reference = copy.deepcopy(low).double()
        reference.model.rotary_emb = copy.deepcopy(exact.model.rotary_emb)
        ids = tokens(4, 48, seed)
        pairs.append(torch.stack([errors(ours.bfloat16(), reference, ids), errors(low, reference, ids)]))
    errors_of_ours, errors_of_hf = torch.stack(pairs).mean(0)
    assert ((errors_of_hf > 1e-3) & (errors_of_hf < 0.1)).all(), "the reference does measure bf16 rounding"
    # another order of the same roundings: the means over six seeds scatter by a few percent
    assert (errors_of_ours <= 1.05 * errors_of_hf).all(), (errors_of_ours, errors_of_hf)


def rounded_once(actual, exact) -> bool:
    # half a unit in the last place at most (below the smallest normal number: of that); 1.01 for the fp32 before it
    ulp = torch.finfo(actual.dtype).eps * exact.abs().clamp(min=torch.finfo(actual.dtype).smallest_normal)
    return ((actual.double() - exact).abs() <= 1.01 * ulp / 2).all().item()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("implementation", ["torch", "torch_fp32"])
def test_norm_rounds_once(implementation, dtype):
    norm = randomize(initialize_rms_norm_module(implementation, 256, eps=1e-6), 1)
    x = (torch.randn(64, 256) * 30).to(dtype)
    weight = norm.to(dtype).weight.double()
    exact = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    assert norm(x).dtype == dtype
    assert rounded_once(norm(x), exact)


def test_norm_in_fp32_keeps_an_fp32_weight():
    x, weight = torch.randn(8, 32).bfloat16(), 1 + torch.randn(32) / 1000
    norm = initialize_rms_norm_module("torch_fp32", 32, eps=1e-6)
    norm.weight.data.copy_(weight)
    exact = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    assert rounded_once(norm(x), exact)


@pytest.mark.parametrize("name", ROPE)
def test_rope_stays_fp32_and_agrees_at_long_positions(name):
    hf, ours = twins(LlamaForCausalLM, rope_config(name))
    short, positions = torch.arange(12)[None], torch.tensor([[0, 1, 4097, 99_999, 100_000, 131_071]])
    tables = hf.model.rotary_emb(torch.ones(1), short), hf.model.rotary_emb(torch.ones(1), positions)
    for dtype in (*LOW, torch.float32):  # there and back: nothing was rounded on the way
        ours.to(dtype)
        assert all(buffer.dtype == torch.float32 for buffer in ours.model.rotary_emb.buffers())
        for where, table in zip((short, positions), tables, strict=True):
            for actual, expected in zip(ours.model.rotary_emb(torch.ones(1), where), table, strict=True):
                assert torch.equal(actual, expected)
    assert ours.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ROPE)
def test_rope_tables_are_rebuilt_on_loading(name, tmp_path):
    hf, ours = twins(LlamaForCausalLM, rope_config(name))
    ours.save_pretrained(tmp_path)
    for options in ({}, {"dtype": "bfloat16"}):
        loaded = OwnLlama.from_pretrained(tmp_path, **options).model.rotary_emb
        for length in (12, 40, 13):
            expected = hf.model.rotary_emb(torch.ones(1), torch.arange(length)[None])
            for pair in zip(loaded(torch.ones(1), torch.arange(length)[None]), expected, strict=True):
                assert torch.equal(*pair)


def test_rope_type_that_nobody_knows():
    config = tiny()
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4}
    with pytest.raises(ValueError, match=r"rope_type='spiral' is not one of .*llama3"):
        RotaryEmbedding(config)


def test_rope_built_in_bf16_is_fp32():
    torch.set_default_dtype(torch.bfloat16)
    try:
        ours = OwnLlama(tiny())
    finally:
        torch.set_default_dtype(torch.float32)
    assert ours.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(ours.model.rotary_emb.inv_freq, OwnLlama(tiny()).model.rotary_emb.inv_freq)


GENERATION = {"llama": (LlamaForCausalLM, {}), "mqa": (LlamaForCausalLM, {"num_key_value_heads": 1})}
GENERATION |= {"qwen2": (Qwen2ForCausalLM, {}), "qwen2-sliding": (Qwen2ForCausalLM, SLIDING)}


def generation_twins(name: str, attn: str = "sdpa"):
    hf_class, changes = GENERATION[name]
    return twins(hf_class, tiny(FAMILIES[name.replace("mqa", "llama").partition("-")[0]][1], attn, **changes))


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", GENERATION)
def test_greedy_tokens(name, attn):
    hf, ours = generation_twins(name, attn)
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = mask[2, :7] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for inputs in ({"input_ids": ids}, {"input_ids": ids * mask, "attention_mask": mask}):
        expected = hf.generate(**inputs, **options, use_cache=False)
        assert expected.unique().numel() > 6, "more than one token again and again"
        for cache in (
            {"use_cache": False},
            {},
            {"past_key_values": DynamicCache()},
            {"cache_implementation": "static"},
        ):
            assert torch.equal(ours.generate(**inputs, **options, **cache), expected), cache


@pytest.mark.parametrize("name", GENERATION)
def test_a_cache_filled_in_pieces_gives_the_logits_of_one_pass(name):
    _, ours = generation_twins(name)
    ids = tokens(2, 12)
    cache = DynamicCache(config=ours.config)
    with torch.no_grad():
        whole = ours(ids, use_cache=False)
        pieces = [ours(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 6), (6, 9), (9, 12))]
    assert whole.past_key_values is None
    assert cache.get_seq_length() == 12
    assert_near(torch.cat(pieces, 1), whole.logits)


def test_beams_and_samples_draw_what_transformers_draws():
    hf, ours = generation_twins("qwen2")
    for options in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 5}):
        drawn = []
        for model in (hf, ours):
            torch.manual_seed(0)
            drawn.append(model.generate(tokens(2, 5), max_new_tokens=6, pad_token_id=0, **options))
        assert torch.equal(*drawn)


def test_sliding_layers_keep_no_more_than_the_window():
    _, ours = generation_twins("qwen2-sliding")
    cache = ours(tokens(1, 11)).past_key_values
    assert isinstance(ours.config, Qwen2Config)
    assert [layer.keys.shape[2] for layer in cache.layers] == [11, 3, 3]  # the newest token makes it four
