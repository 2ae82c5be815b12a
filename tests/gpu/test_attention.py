"""Every attention that runs here, on a CUDA device: no further from float64 than eager, documents apart, tokens alike.

Run on a GPU machine with ``pytest -m gpu tests/gpu/test_attention.py``. Backends whose package is not installed are
skipped, each with the line that installs it; what a backend does not have, the table says, and it has to refuse.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nemo_automodel.components.models.common.attention import DecoderAttention
from nemo_automodel.components.models.common.capabilities import ATTENTIONS, Need, absent, missing
from tests.conftest import tiny, tokens, twins

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = [[200, 1, 56, 127], [384]]
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
IDS = tokens(*POSITIONS.shape)
WINDOW, CAP = 33, 5.0
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=f"{name} {why}"))
    for name, why in ((name, absent(row)) for name, row in ATTENTIONS.items())
    if name != "eager"
]


class Case(NamedTuple):
    """What an attention is asked to compute."""

    layout: str = "rows"
    group: int = 4
    head_dim: int = 64
    window: int | None = None
    softcap: float | None = None

    def need(self, device: torch.device, dtype: torch.dtype) -> Need:
        left = self.layout == "padding on the left"
        asked = Need(device=device, dtype=dtype, backward=True, head_dim=self.head_dim, left_padding=left)
        return replace(asked, window=self.window, softcap=self.softcap, packing=self.layout == "packed")

    def inputs(self) -> dict[str, Tensor]:
        """Of a forward pass, on the CPU."""
        if self.layout == "packed":
            return {"position_ids": POSITIONS}
        mask = torch.ones_like(IDS)
        if self.layout == "padding on the left":
            mask[0, :150] = 0
        elif self.layout == "padding on the right":
            mask[0, 250:] = 0
        return {} if self.layout == "rows" else {"attention_mask": mask}

    def seen(self) -> Tensor:
        """``[B, 1, S, S]``: whether a token sees another, for tokens that are real."""
        inputs, (_, length) = self.inputs(), IDS.shape
        behind = torch.arange(length)[:, None] - torch.arange(length)
        seen = ((behind >= 0) & (behind < (self.window or length))).expand(len(IDS), -1, -1)
        if "position_ids" in inputs:
            document = (POSITIONS == 0).cumsum(1)
            seen = seen & (document[:, :, None] == document[:, None])
        if "attention_mask" in inputs:
            seen = seen & inputs["attention_mask"].bool()[:, None]
        return seen[:, None]


LAYOUTS = ("rows", "packed", "padding on the left", "padding on the right")
CASES = [
    *(Case(layout) for layout in LAYOUTS),
    *(Case(layout, window=WINDOW) for layout in LAYOUTS),
    *(Case(layout, softcap=CAP) for layout in LAYOUTS),
    *(Case("packed", group, window=WINDOW, softcap=CAP) for group in (1, 2, 8)),
    *(Case("packed", group, window=WINDOW) for group in (1, 2, 3, 8)),
    *(Case("packed", head_dim=head_dim) for head_dim in (80, 96, 128, 256)),
    *(Case("packed", head_dim=head_dim, window=WINDOW, softcap=CAP) for head_dim in (128, 256)),
]


def one_layer(case: Case) -> Any:
    """A model of one layer that asks of its attention what the case says: its masks, its windows, its softcap."""
    sizes = {"head_dim": case.head_dim, "num_attention_heads": 2 * case.group, "num_key_value_heads": 2}
    sizes |= {"hidden_size": 32 * case.group, "num_hidden_layers": 1, "max_position_embeddings": 512}
    kind = "full_attention" if case.window is None else "sliding_attention"
    config = tiny(
        Gemma2Config,
        "eager",
        **sizes,
        attn_logit_softcapping=case.softcap,
        sliding_window=case.window or 4096,
        layer_types=[kind],
        query_pre_attn_scalar=case.head_dim,
    )
    return twins(Gemma2ForCausalLM, config)[1].model


def heads(case: Case, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value as the decoder gives them (tokens before heads in memory), and a gradient of the output."""
    generator = torch.Generator().manual_seed(case.group * case.head_dim)
    counts = (2 * case.group, 2, 2, 2 * case.group)
    made = [torch.randn(*IDS.shape, count, case.head_dim, generator=generator) for count in counts]
    if (mask := case.inputs().get("attention_mask")) is not None:
        made[3] *= mask[:, :, None, None]  # of padding nobody asks for anything
    query, key, value, grad = (x.to(device, dtype) for x in made)
    return [query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), grad]


@contextmanager
def instead(leaves: list[Tensor]) -> Iterator[list[Tensor]]:
    """Attention layers attend with ``leaves`` for queries, keys and values; gives the list of their outputs."""
    outputs: list[Tensor] = []
    attend = DecoderAttention._attend

    def attended(self: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
        output, weights = attend(self, *leaves, *args, **options)
        outputs.append(output)
        return output.detach().to(q.dtype), weights

    DecoderAttention._attend = attended  # type: ignore[method-assign]
    try:
        yield outputs
    finally:
        DecoderAttention._attend = attend  # type: ignore[method-assign]


def attend(name: str, case: Case, inputs: list[Tensor], backward: bool = True) -> list[Tensor]:
    """The output ``[B, S, H, D]`` of real tokens, and the gradients of queries, keys and values."""
    *tensors, grad = inputs
    leaves = [x.detach().requires_grad_(backward) for x in tensors]
    model = one_layer(case).to(grad.device, grad.dtype)
    model.config._attn_implementation = ATTENTIONS[name].implementation
    given = {key: value.to(grad.device) for key, value in case.inputs().items()}
    with instead(leaves) as outputs, torch.set_grad_enabled(backward):
        model(IDS.to(grad.device), use_cache=False, **given)
    real = given.get("attention_mask", torch.ones_like(IDS, device=grad.device))[:, :, None, None]
    output = outputs[0]
    gradients = torch.autograd.grad(output, leaves, grad) if backward else []
    return [output.detach() * real, *gradients]


def exact(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    """The same in float64, by plain operations (eager's softmax would be in float32)."""
    query, key, value, grad = (x.double() for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    k, v = (x.repeat_interleave(case.group, 1) for x in leaves[1:])
    scores = leaves[0] @ k.transpose(2, 3) * case.head_dim**-0.5
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    seen = case.seen().to(grad.device)
    weights = scores.masked_fill(~seen, -1e300).softmax(-1) * seen.any(-1, keepdim=True)
    output = (weights @ v).transpose(1, 2)
    real = case.inputs().get("attention_mask", torch.ones_like(IDS)).to(grad.device)[:, :, None, None]
    return [output.detach() * real, *torch.autograd.grad(output, leaves, grad)]


def error(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm()).item()


@cache
def refusal_of_softcap(name: str) -> str | None:
    """In the words of a build that leaves it out; those that may are named in the table."""
    if ATTENTIONS[name].has["softcap"] == "yes":
        return None
    case = Case(softcap=CAP)
    try:
        attend(name, case, heads(case, torch.device("cuda"), torch.bfloat16))
    except RuntimeError as error:
        return str(error)
    return None


def skip_without_softcap(name: str, softcap: float | None) -> None:
    if softcap is not None and (refusal := refusal_of_softcap(name)) is not None:
        pytest.skip(f"built without a softcap: {refusal}")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_no_further_from_float64_than_eager_or_refused(name: str, case: Case) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    inputs = heads(case, device, dtype)
    if (gap := missing(ATTENTIONS[name], case.need(device, dtype))) is not None:
        with pytest.raises(ValueError, match=f"attention '{name}' has no "):
            attend(name, case, inputs)
        pytest.skip(f"refused, as it should be: no {gap.what}")
    skip_without_softcap(name, case.softcap)
    truth, eager, ours = exact(case, inputs), attend("eager", case, inputs), attend(name, case, inputs)
    for what, a, b, t in zip(("output", "query", "key", "value"), ours, eager, truth, strict=True):
        # roundings of the same size over 10^5 values, and eager has one more, of its scores
        assert 0 < error(a, t) < 1.15 * error(b, t), what


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_document_leaves_the_others_alone(name: str, head_dim: int, window: int | None) -> None:
    case, device, dtype = Case("packed", head_dim=head_dim, window=window), torch.device("cuda"), torch.bfloat16
    if missing(ATTENTIONS[name], case.need(device, dtype)) is not None:
        pytest.skip("the table says that it does not")
    inputs = heads(case, device, dtype)
    begin, end = 201, 257  # the third document of the first row
    changed = [x.clone() for x in inputs]
    for x in changed[:3]:
        x[0, :, begin:end] = x[0, :, begin:end].flip(-1) * 2
    before, after = (attend(name, case, each)[0] for each in (inputs, changed))
    assert not torch.equal(before[0, begin:end], after[0, begin:end])
    before[0, begin:end] = after[0, begin:end] = 0
    assert torch.equal(before, after)


SHAPE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 2}
SHAPE |= {"max_position_embeddings": 512}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"head_dim": 64}),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1},
    ),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"head_dim": 64, "sliding_window": 33, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 64},
    ),
}


def models(family: str) -> tuple[Any, Any]:
    """transformers' model, eager, and ours, both in float32 on the CPU."""
    hf_class, config_class, changes = MODELS[family]
    hf, ours = twins(hf_class, tiny(config_class, "eager", **SHAPE, **changes))
    for model in (hf, ours):  # randomize's weights are for narrow layers; these would saturate
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data *= 0.25
    return hf, ours


def use(model: Any, name: str) -> None:
    """Let the model attend by that backend, or skip."""
    layer = next(each for each in model.modules() if isinstance(each, DecoderAttention))
    parameter = next(model.parameters())
    need = replace(layer.need(), device=parameter.device, dtype=parameter.dtype, backward=True)
    if (gap := missing(ATTENTIONS[name], need)) is not None:
        pytest.skip(f"no {gap.what}")
    skip_without_softcap(name, need.softcap)
    model.set_attn_implementation(ATTENTIONS[name].implementation)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_of_a_whole_model_on_packed_rows(name: str, family: str) -> None:
    hf, ours = models(family)
    exact_model, ours = copy.deepcopy(hf).double().cuda(), ours.to("cuda", torch.bfloat16).train()
    ids = IDS.cuda()
    inputs = {"input_ids": ids, "labels": ids, "position_ids": POSITIONS.cuda(), "use_cache": False}
    exact_model(**inputs).loss.backward()
    truth = ours.state_dict_adapter.from_hf({key: p.grad for key, p in exact_model.named_parameters()})
    errors: list[dict[str, float]] = []
    for each in (name, "eager"):
        use(ours, each)
        ours.zero_grad()
        ours(**inputs).loss.backward()
        errors.append({key: error(p.grad, truth[key]) for key, p in ours.named_parameters()})
    for key, own in errors[0].items():
        # one draw of roundings each, of all the layers above: they vary by a tenth or two
        assert 0 < own < 1.3 * errors[1][key], key


@pytest.mark.parametrize("length", [33, 100])
@pytest.mark.parametrize("name", BACKENDS)
def test_rows_shorter_than_a_block(name: str, length: int) -> None:
    """Four query heads to a key head are then more queries than flex's kernel for decoding takes."""
    hf, ours = models("llama")
    ours = ours.to("cuda", torch.bfloat16).train()
    exact_model, ids = copy.deepcopy(hf).double().cuda(), IDS[:, :length].cuda()
    exact_model(ids, labels=ids, use_cache=False).loss.backward()
    truth = ours.state_dict_adapter.from_hf({key: p.grad for key, p in exact_model.named_parameters()})
    errors: list[dict[str, float]] = []
    for each in (name, "eager"):
        use(ours, each)
        ours.zero_grad()
        ours(ids, labels=ids, use_cache=False).loss.backward()
        errors.append({key: error(p.grad, truth[key]) for key, p in ours.named_parameters()})
    for key, own in errors[0].items():
        # one draw of roundings each, over fewer tokens than in whole rows
        assert 0 < own < 1.5 * errors[1][key], key


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", BACKENDS)
def test_greedy_tokens_in_fp32_are_those_of_eager(name: str, family: str) -> None:
    device = torch.device("cuda")
    if missing(ATTENTIONS[name], Need(device=device, dtype=torch.float32, cache=True, left_padding=True)) is not None:
        pytest.skip("it has no float32, or no cache")
    _, ours = models(family)
    ours.to(device)
    mask = torch.ones(2, 100, dtype=torch.long, device=device)
    mask[0, :37] = 0
    options = {"attention_mask": mask, "max_new_tokens": 60, "do_sample": False, "pad_token_id": 0, "eos_token_id": 0}
    expected = ours.generate(IDS[:, :100].cuda(), **options)
    use(ours, name)
    assert torch.equal(ours.generate(IDS[:, :100].cuda(), **options), expected)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", BACKENDS)
def test_fifty_steps_follow_eager(name: str, family: str) -> None:
    losses = []
    for each in (name, "eager"):
        ours = models(family)[1].to("cuda", torch.bfloat16).train()
        use(ours, each)
        optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3, fused=True)
        losses.append([])
        for step in range(50):
            ids = tokens(*POSITIONS.shape, seed=step % 4).cuda()
            loss = ours(ids, labels=ids, position_ids=POSITIONS.cuda(), use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # bf16, fifty steps deep
    assert losses[0][-1] < 0.9 * losses[0][0]


def test_checkpointing_changes_no_bit_of_flex() -> None:
    ours = models("gemma2")[1].to("cuda", torch.bfloat16).train()
    use(ours, "flex")
    inputs = {"input_ids": IDS.cuda(), "labels": IDS.cuda(), "position_ids": POSITIONS.cuda(), "use_cache": False}
    gradients = []
    for _ in range(2):
        ours.zero_grad()
        ours(**inputs).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in ours.parameters()])
        enable = getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    assert all(map(torch.equal, *gradients))


def test_flex_makes_nothing_of_the_size_of_the_scores_and_never_waits() -> None:
    """16,384 tokens in a row: a mask of bytes would be 256 MiB."""
    case = Case("packed")
    model = one_layer(case).to("cuda", torch.bfloat16)
    model.config._attn_implementation = "flex_attention"
    lengths = [4000, 1, 7000, 5383]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    ids = tokens(1, sum(lengths)).cuda()
    for again in (False, True):  # kernels are compiled at their first call
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error" if again else "default")
        try:
            model(ids, position_ids=positions, use_cache=False).last_hidden_state.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not again or torch.cuda.max_memory_allocated() - before < 200 * 2**20
