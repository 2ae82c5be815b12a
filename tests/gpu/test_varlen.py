"""Varlen attention on a CUDA device: rounding beside sdpa's, packed documents apart, and a whole model.

Run on a GPU machine with ``pytest -m gpu tests/gpu``.
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nemo_automodel.components.models.common import decoder
from nemo_automodel.components.models.common.capabilities import ATTENTIONS, absent
from nemo_automodel.components.models.common.varlen import Documents, varlen_attention_forward
from nemo_automodel.config import load_config
from nemo_automodel.recipes.train import Run, TrainConfig
from tests.conftest import tiny, tokens, twins
from tests.recipes.conftest import checkpoint, overrides, rows  # noqa: F401  (fixtures)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = [[200, 1, 56, 127], [384]]
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
WINDOW = 33


def heads(group: int, head_dim: int, kv_heads: int = 2, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Query, key, value as the decoder gives them (tokens before heads in memory), and a gradient of the output."""
    generator = torch.Generator().manual_seed(group * head_dim)
    batch, length = POSITIONS.shape
    counts = (group * kv_heads, kv_heads, kv_heads, group * kv_heads)
    made = [torch.randn(batch, length, count, head_dim, generator=generator) for count in counts]
    query, key, value, grad = (x.to("cuda", dtype) for x in made)
    return [query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), grad]


def mask(window: int | None) -> Tensor:
    """``[B, 1, S, S]``: whether a token sees another."""
    document = (POSITIONS == 0).cumsum(1)
    behind = torch.arange(POSITIONS.shape[1])[:, None] - torch.arange(POSITIONS.shape[1])
    seen = (document[:, :, None] == document[:, None, :]) & (behind >= 0)
    return (seen if window is None else seen & (behind < window))[:, None].cuda()


def attend(name: str, inputs: list[Tensor], window: int | None) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    query, key, value, grad = inputs
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    layer: Any = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], training=False, is_causal=True)
    seen: Any = Documents.of(POSITIONS.cuda()) if name == "varlen" else mask(window)
    output, _ = ALL_ATTENTION_FUNCTIONS[name](
        layer, *leaves, seen, scaling=query.shape[-1] ** -0.5, sliding_window=window
    )
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_no_further_from_float64_than_sdpa_with_a_mask(group: int, head_dim: int, window: int | None) -> None:
    inputs = heads(group, head_dim)
    exact = [torch.cat(parts) for parts in zip(*rowwise(inputs, window), strict=True)]
    sdpa, ours = attend("sdpa", inputs, window), attend("varlen", inputs, window)
    for what, a, b, truth in zip(("output", "query", "key", "value"), ours, sdpa, exact, strict=True):
        assert a.shape == truth.shape
        # two kernels with roundings of the same number and size, over 10^5 values: equal to a few hundredths
        assert 0 < error(a, truth) < 1.15 * error(b, truth), what


def rowwise(inputs: list[Tensor], window: int | None) -> list[list[Tensor]]:
    """The same in float64, one row of the batch after the other (eager's softmax would be in fp32)."""
    results = []
    for row in range(len(POSITIONS)):
        query, key, value, grad = (x[row : row + 1].double() for x in inputs)
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        group = query.shape[1] // key.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in leaves[1:])
        scores = leaves[0] @ k.transpose(2, 3) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask(window)[row : row + 1], float("-inf")).softmax(-1)
        output = (weights @ v).transpose(1, 2)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, grad)])
    return results


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_document_leaves_the_others_alone(head_dim: int, window: int | None) -> None:
    inputs = heads(4, head_dim)
    begin, end = 201, 257  # the third document of the first row
    changed = [x.clone() for x in inputs]
    for x in changed[:3]:
        x[0, :, begin:end] = x[0, :, begin:end].flip(-1) * 2
    before, after = (attend("varlen", each, window)[0] for each in (inputs, changed))
    assert not torch.equal(before[0, begin:end], after[0, begin:end])
    before[0, begin:end] = after[0, begin:end] = 0
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_alone_and_packed_are_the_same_bits(dtype: torch.dtype) -> None:
    """``longest`` is no more than a bound: how rows are cut up into documents does not change one of them."""
    inputs = heads(2, 64, dtype=dtype)
    packed = attend("varlen", inputs, None)[0][0]
    layer: Any = nn.Module()
    bounds = [0, *torch.tensor(LENGTHS[0]).cumsum(0).tolist()]
    for begin, end in pairwise(bounds):
        query, key, value = (x[:1, :, begin:end] for x in inputs[:3])
        alone = Documents.rows(1, end - begin, query.device)
        output, _ = varlen_attention_forward(layer, query, key, value, alone, scaling=64**-0.5)
        assert torch.equal(output[0], packed[begin:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"no kernel for float(32|64) on cuda, .*: use backend.attn='sdpa' or "):
        attend("varlen", heads(1, 64, dtype=dtype), None)


def llama(**changes: Any) -> tuple[Any, Any]:
    """transformers' Llama in float64, and ours on the GPU in bf16."""
    shape = {"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = tiny(attn="eager", **{**shape, "head_dim": 64, "max_position_embeddings": 512, **changes})
    hf, ours = twins(LlamaForCausalLM, config)
    for model in (hf, ours):  # randomize's weights are for narrow layers; these would saturate
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data *= 0.25
    return copy.deepcopy(hf).double().cuda(), ours.to("cuda", torch.bfloat16).train()


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 8}, {"tie_word_embeddings": True}], ids=str)
def test_a_whole_llama(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of packed rows: no further from float64 than the same model with sdpa and a mask."""
    exact, ours = llama(**changes)
    ids = tokens(*POSITIONS.shape).cuda()
    inputs = {"input_ids": ids, "labels": ids, "position_ids": POSITIONS.cuda(), "use_cache": False}
    exact(**inputs).loss.backward()
    truth = ours.state_dict_adapter.from_hf({name: p.grad for name, p in exact.named_parameters()})
    errors: dict[str, dict[str, float]] = {}
    for attn in ("sdpa", "varlen"):
        ours.set_attn_implementation(attn)
        ours.zero_grad()
        if attn == "varlen":
            monkeypatch.setattr(decoder, "MASKS", {})
        ours(**inputs).loss.backward()
        errors[attn] = {name: error(p.grad, truth[name]) for name, p in ours.named_parameters()}
    for name, ours_error in errors["varlen"].items():
        # one draw of roundings each, of all the layers above: they vary by a tenth or two
        assert 0 < ours_error < 1.3 * errors["sdpa"][name], name


def test_documents_made_on_the_host_spare_the_wait() -> None:
    _, ours = llama()
    ids = tokens(*POSITIONS.shape).cuda()
    expected = ours(ids, position_ids=POSITIONS.cuda(), use_cache=False)
    ours.set_attn_implementation("varlen")
    positions = POSITIONS.cuda()
    bounds, longest = Documents.of(POSITIONS)
    given = Documents(bounds.cuda(), longest).as_inputs()
    ours(ids, position_ids=positions, use_cache=False, **given)  # kernels are compiled at their first call
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_given = ours(ids, position_ids=positions, use_cache=False, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = ours(ids, position_ids=positions, use_cache=False)
    assert torch.equal(with_given.logits, found.logits)
    torch.testing.assert_close(found.logits, expected.logits, atol=0.05, rtol=0.05)  # bf16, two layers deep


@pytest.mark.parametrize("attn", ["auto", "varlen", "te"])
def test_a_packed_training_takes_it_and_never_waits(attn: str, overrides: Callable[..., list[str]]) -> None:  # noqa: F811
    """The losses are near those of sdpa with a mask; once its kernels are compiled, no step makes the host wait."""
    if attn == "te" and (why := absent(ATTENTIONS["te"])) is not None:
        pytest.skip(f"te {why}")
    packing = {"data__packing": "true", "data__max_length": 128, "train__batch_size": 2, "train__max_steps": 8}
    fastest = "varlen" if absent(ATTENTIONS["te"]) else "te"
    losses = {}
    for name, line in {attn: {"auto": f"{fastest} (packed"}.get(attn, f"{attn} (asked"), "sdpa": "sdpa, cuDNN"}.items():
        said: list[str] = []
        config = load_config(TrainConfig, None, overrides(name, **packing, model__backend__attn=name, optim__lr="1e-3"))
        run = Run(config, said.append)
        assert said[-1].startswith(f"attention: {line}")
        for step in range(1, 9):
            if step == 5 and name == attn:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                run.step(step)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        losses[name] = [row["loss"] for _, row in run.rows(until=8)]
    assert losses[attn] == pytest.approx(losses["sdpa"], rel=0.02)  # bf16, eight steps deep
    assert losses[attn][-1] < losses[attn][0]
