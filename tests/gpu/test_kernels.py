"""On a CUDA device: every Triton kernel against float64, and no further from it than PyTorch's operations in bf16.

Run on a GPU machine with ``pytest -m gpu tests/gpu/test_kernels.py -s``, which prints the distances. For reads and
writes outside of tensors (each in memory of its own, so that they are noticed):

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \\
        python -m pytest -m gpu tests/gpu/test_kernels.py -k small_and_odd
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from nemo_automodel.components.kernels import gated as gated_module
from nemo_automodel.components.kernels import linear_cross_entropy as loss_module
from nemo_automodel.components.kernels import qkv_rope
from nemo_automodel.components.kernels.add_norm import add_norm, add_norm_forward, add_norm_reference
from nemo_automodel.components.kernels.gated import gated, gated_forward, gated_reference
from nemo_automodel.components.kernels.qkv_rope import split_and_turn, split_and_turn_reference
from nemo_automodel.components.layout import GATE_UP
from nemo_automodel.components.loss import next_token_loss
from nemo_automodel.components.peft import LoRAConfig, LoRALinear, apply_lora, join_adapters
from tests.components.kernels.cases import (
    BF16,
    FP32,
    LEARNT,
    ODD,
    Case,
    assert_equal,
    counted,
    distance,
    gated_case,
    learnt,
    linear_case,
    loss_case,
    mlp_case,
    norm_case,
    rope_case,
    tied_case,
    values,
)
from tests.conftest import assert_near, tiny, twins

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")
DTYPES = [BF16, torch.float16, FP32]


@pytest.fixture(autouse=True)
def _exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # which few rows take, and many do not


def assert_no_further(make: Callable[..., Case], seeds: int = 3, ratio: float = 1.1, **to: Any) -> None:
    """Mean distances from float64 over ``seeds``, the kernel's beside the reference's in the same dtype."""
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        case = make(device=CUDA, **to)
        for total, function in ((ours, case.kernel), (theirs, case.reference)):
            for name, error in case.errors(function).items():
                total[name] = total.get(name, 0.0) + error / seeds
    print("".join(f"\n  {name}: kernel {ours[name]:.2e}, eager {theirs[name]:.2e}" for name in ours))
    # a few roundings of fp32, whose sums torch's kernels order otherwise
    too_far = {name: (ours[name], theirs[name]) for name in ours if ours[name] > ratio * theirs[name] + 1e-6}
    assert not too_far, f"(kernel, eager): {too_far}"


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("name", ODD)
def test_small_and_odd_shapes(name: str, dtype: torch.dtype) -> None:
    case = ODD[name](dtype=dtype, device=CUDA)
    errors = case.errors()
    # some five roundings in a row, each of at most eps / 2, in tensors too small for the mean; fp32's own beside them
    assert max(errors.values()) < 3 * torch.finfo(dtype).eps + 2e-6, errors


# --- kernel by kernel


def shapes(first: Any, *others: Any) -> Any:
    """The first in all dtypes, the others in bf16: each is a program, and these tests take their time compiling."""
    return [*((first, dtype) for dtype in DTYPES), *((other, BF16) for other in others)]


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize(("shape", "dtype"), shapes((2, 100, 1337), (301, 1024), (40, 9000)))
def test_gated(shape: tuple[int, ...], activation: str, dtype: torch.dtype) -> None:
    for strided in (False, True):
        assert_no_further(partial(gated_case, *shape, activation=activation, strided=strided), dtype=dtype)


@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no branch"])
@pytest.mark.parametrize(("shape", "dtype"), shapes((2, 100, 1337), (301, 512), (3000, 2048), (40, 16384), (3, 65536)))
def test_add_norm(shape: tuple[int, ...], branch: bool, dtype: torch.dtype) -> None:
    for offset in (0.0, 1.0):
        assert_no_further(partial(norm_case, *shape, branch=branch, offset=offset), dtype=dtype)
    assert_no_further(partial(norm_case, *shape, branch=branch, frozen=True, strided=True), dtype=dtype)


HEADS = [(8, 64, 64), (1, 80, 80), (2, 80, 32), (3, 96, 96), (4, 96, 72), (5, 128, 128), (6, 128, 64), (7, 256, 256)]
"""Query heads per KV head, channels, channels that turn: every group, every width."""


@pytest.mark.parametrize(("heads", "dtype"), shapes(*HEADS))
def test_qkv_rope(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    for shared in (True, False):
        make = partial(rope_case, 2, 131, 2, *heads, shared=shared, strided=not shared)
        assert_no_further(make, 1, dtype=dtype)


@pytest.mark.parametrize(("heads", "dtype"), shapes(HEADS[2], HEADS[0], *HEADS[4:6], HEADS[7]))
def test_norms_of_heads(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    for norms, offset in ((True, 0.0), (True, 1.0), ("frozen", 0.0)):
        assert_no_further(partial(rope_case, 2, 531, 2, *heads, norms=norms, offset=offset), dtype=dtype)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("vocabulary", "dtype"), shapes(1009, 8192, 32003))
@pytest.mark.parametrize("chunked", [False, True], ids=["one chunk", "chunks"])
def test_linear_cross_entropy(
    vocabulary: int, softcap: float | None, chunked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        monkeypatch.setattr(loss_module, "CHUNK_TRAINED", 128 * vocabulary)
    for frozen in (False, True):
        make = partial(loss_case, 333, 256, vocabulary, 0.7, softcap, frozen=frozen)
        ours = [make(dtype=dtype, device=CUDA) for _ in range(3)]
        for case in ours:
            loss = case.errors()["output 0"]
            assert loss < (3e-6 if dtype == FP32 else 2e-4), loss  # logits are rounded, their errors average out
        assert_no_further(partial(_without_output, make), dtype=dtype)


def _without_output(make: Callable[..., Case], **to: Any) -> Case:
    """Whose errors are the gradients': one number's error is chance."""
    case = make(**to)
    outcome = case.outcome
    case.outcome = lambda *args: {k: v for k, v in outcome(*args).items() if k != "output 0"}  # type: ignore[method-assign]
    return case


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("recipe", ["silu", "gelu_pytorch_tanh", "normed"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_linear(recipe: str, frozen: bool, bias: bool, dtype: torch.dtype) -> None:
    make = partial(linear_case, (2, 133), 640, 768, recipe, frozen=frozen, bias=bias)
    assert_no_further(make, dtype=dtype)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("recipe", [None, "silu", "gelu_pytorch_tanh", "normed"])
@pytest.mark.parametrize("ranks", [{"o_proj": 8}, {"o_proj": 40}, {"gate_proj": 8, "up_proj": 16}, {"up_proj": 16}])
def test_adapters(ranks: dict[str, int], recipe: str | None, joined: bool, dtype: torch.dtype) -> None:
    fusion = None if "o_proj" in ranks else GATE_UP
    for room in (0, 64) if recipe == "normed" and joined else (0,):
        make = partial(linear_case, (2, 133), 640, 768, recipe, ranks=ranks, fusion=fusion, joined=joined, room=room)
        assert_no_further(make, dtype=dtype)


@pytest.mark.parametrize("recipe", [None, "silu", "normed"])
@pytest.mark.parametrize("ranks", [{"o_proj": 16}, {"gate_proj": 8, "up_proj": 16}], ids=str)
def test_adapters_over_weights_in_float8(ranks: dict[str, int], recipe: str | None) -> None:
    """Beside plain operations that round the same operands to float8."""
    fusion = None if "o_proj" in ranks else GATE_UP
    make = partial(linear_case, (2, 133), 640, 768, recipe, ranks=ranks, fusion=fusion, float8=True)
    # Hopper adds products of float8 up in fewer bits than fp32 has, where it is let (use_fast_accum)
    assert_no_further(make, ratio=1.5, dtype=BF16)


@pytest.mark.parametrize("rank", [1, 3, 64, 128])
def test_ranks_of_adapters_whatever_they_are(rank: int) -> None:
    assert_no_further(partial(linear_case, (133,), 640, 768, "silu", ranks={"down_proj": rank}), dtype=BF16)


@pytest.mark.parametrize("tile", [(16, 16, 1), (64, 32, 4), (32, 128, 8)])
def test_results_do_not_depend_on_tiles(tile: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_module, "TILE", tile)
    monkeypatch.setattr(gated_module, "STRETCH", 64)
    assert_no_further(partial(linear_case, (133,), 640, 768, "silu", ranks={"down_proj": 24}), dtype=BF16)


@pytest.mark.parametrize(("block", "tokens", "warps"), [(64, 1, 1), (256, 8, 4), (4096, 64, 8)])
def test_values_do_not_depend_on_blocks(block: int, tokens: int, warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [gated_case(77, 1100, dtype=BF16, device=CUDA), rope_case(2, 131, 2, 3, 64, dtype=BF16, device=CUDA)]
    before = [case.outcome(case.kernel, case.inputs) for case in cases]
    monkeypatch.setattr(gated_module, "BLOCK", block)
    monkeypatch.setattr(qkv_rope, "TOKENS", tokens)
    monkeypatch.setattr(qkv_rope, "WARPS", warps)
    for case, expected in zip(cases, before, strict=True):
        assert_equal(case.outcome(case.kernel, case.inputs), expected)


def test_what_lies_around_stays() -> None:
    gate_up, x = (values(33, width, dtype=BF16, device=CUDA) for width in (2 * 1100, 1100))
    weight = values(1100, dtype=BF16, device=CUDA)
    for write in (
        lambda out: gated_forward(gate_up, out, 0),
        lambda out: add_norm_forward(x, None, weight, None, out, None, 1e-5, 0.0),
    ):
        around = torch.full((35, 1150), 7.0, dtype=BF16, device=CUDA)
        with torch.no_grad():
            write(around[1:34, 11:1111])
        assert (around[1:34, 11:1111] != 7).float().mean() > 0.9
        around[1:34, 11:1111] = 7
        assert (around == 7).all()


def test_gradients_of_a_sum() -> None:
    """Whose gradient is one number seen many times, with strides of zero."""
    for case in (gated_case(5, 37, dtype=BF16, device=CUDA), rope_case(1, 9, 2, 2, 64, dtype=BF16, device=CUDA)):
        x = case.inputs[0]
        assert x is not None
        outs = []
        for dense in (False, True):
            out = case.kernel(*case.inputs)
            out = out if isinstance(out, tuple) else (out,)
            grads = [
                torch.ones_like(o) if dense else torch.ones((), dtype=BF16, device=CUDA).expand(o.shape) for o in out
            ]
            outs.append(torch.autograd.grad(out, x, grads)[0])
        assert torch.equal(*outs)


# --- more elements than int32 counts


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(
    "ranks", [{"gate_proj": 16, "up_proj": 16}, {"gate_proj": 8, "up_proj": 32}, {"up_proj": 40}], ids=str
)
def test_adapters_in_both_layers_of_an_mlp(ranks: dict[str, int], joined: bool) -> None:
    """Several stretches of rows and of columns, both with a rest."""
    assert_no_further(partial(mlp_case, 2, 531, hidden=256, width=2200, ranks=ranks, joined=joined), 1, dtype=BF16)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_tied_embeddings(dtype: torch.dtype) -> None:
    """Tokens as frequent as in text: once, and half of all."""
    for seed in range(2):
        torch.manual_seed(seed)
        ids = (1009 ** torch.rand(4, 700)).long() - 1
        ids[:, ::2] = 17
        make = partial(tied_case, ids, 1009, 1100, padding=5 if seed else None)
        assert_no_further(make, 1, dtype=dtype)
        case = make(dtype=dtype, device=CUDA)
        assert_equal(case.outcome(case.kernel, case.inputs), case.outcome(case.kernel, case.inputs))


def _ends(tensor: Tensor) -> Tensor:
    return torch.cat([tensor[:2], tensor[-3:]])


def test_gated_of_more_elements_than_int32_counts() -> None:
    count, width = 2**16 + 5, 2**14
    gate_up = torch.randn(count, 2 * width, dtype=BF16, device=CUDA).requires_grad_()
    assert gate_up.numel() > 2**31
    grad = torch.randn(count, width, dtype=BF16, device=CUDA)
    out = gated(gate_up, "silu")
    out.backward(grad)
    truth = _ends(gate_up.detach()).double().requires_grad_()
    expected = gated_reference(truth, "silu")
    expected.backward(_ends(grad).double())
    assert gate_up.grad is not None
    assert distance(_ends(out.detach()), expected.detach()) < 2**-8
    assert distance(_ends(gate_up.grad), truth.grad) < 2**-8


def test_adapters_of_more_elements_than_int32_counts() -> None:
    """The gated kernel with their gradient on its way."""
    count, width = 2**16 + 5, 2**14
    with torch.no_grad():
        gate_up = torch.randn(count, 2 * width, dtype=BF16, device=CUDA)
        grad = torch.randn(count, width, dtype=BF16, device=CUDA)
        left, right = (torch.randn(*s, dtype=BF16, device=CUDA) / 4 for s in ((count, 16), (16, width)))
        actual, sums, _ = gated_module.gated_low_rank_backward(grad, gate_up, 0, left, right)
        out = torch.empty_like(grad)
        gated_module.gated_forward(gate_up, out, 0)
        assert distance(sums, left.float().t() @ out.float()) < 2**-8
    truth = _ends(gate_up).double().requires_grad_()
    expected = gated_reference(truth, "silu")
    expected.backward(_ends(grad).double() + _ends(left).double() @ right.double())
    assert distance(_ends(actual), truth.grad) < 2**-8


def test_add_norm_of_more_elements_than_int32_counts() -> None:
    count, n = 2**18 + 5, 2**13
    x, branch = (torch.randn(count, n, dtype=BF16, device=CUDA).requires_grad_() for _ in range(2))
    weight = torch.randn(n, dtype=BF16, device=CUDA)
    total, normed, _ = add_norm(x, branch, weight, 1e-5)
    torch.autograd.backward((total, normed), (branch.detach(), x.detach()))
    ends = [_ends(t.detach()).double().requires_grad_() for t in (x, branch)]
    expected = add_norm_reference(*ends, weight.double(), 1e-5)
    torch.autograd.backward(expected, (ends[1].detach(), ends[0].detach()))
    assert x.grad is not None
    assert distance(_ends(total.detach()), expected[0].detach()) < 2**-8
    assert distance(_ends(normed.detach()), expected[1].detach()) < 2**-7  # of the rounded sum
    assert distance(_ends(x.grad), ends[0].grad) < 2**-7


def test_rope_of_more_elements_than_int32_counts() -> None:
    sequence, group, head_dim = 2**19 + 5, 2, 128
    qkv = torch.randn(1, sequence, 8 * (group + 2) * head_dim, dtype=BF16, device=CUDA).requires_grad_()
    assert qkv.numel() > 2**31
    angle = torch.randn(1, sequence, head_dim // 2, device=CUDA)
    cos, sin = (f(torch.cat((angle, angle), -1)) for f in (torch.cos, torch.sin))
    parts = split_and_turn(qkv, cos, sin, group, head_dim)
    grads = [torch.randn_like(part) for part in parts]
    torch.autograd.backward(parts, grads)
    truth = _ends(qkv.detach()[0]).double()[None].requires_grad_()
    tables = [_ends(table[0]).double()[None] for table in (cos, sin)]
    expected = split_and_turn_reference(truth, *tables, group, head_dim)
    torch.autograd.backward(expected, [_ends(grad[0].transpose(0, 1)).transpose(0, 1)[None].double() for grad in grads])
    assert qkv.grad is not None
    for part, right in zip(parts, expected, strict=True):
        assert distance(_ends(part.detach()[0].transpose(0, 1)), right[0].transpose(0, 1).detach()) < 2**-8
    assert distance(_ends(qkv.grad[0]), truth.grad[0]) < 2**-8


# --- compiled, and made again


COMPILED: dict[str, Callable[..., Case]] = {
    "gated": partial(gated_case, 3, 5, 1100),
    "norm": partial(norm_case, 33, 1100, offset=1.0),
    "norm, no branch, frozen": partial(norm_case, 33, 1100, branch=False, frozen=True),
    "rope": partial(rope_case, 2, 37, 2, 3, 64),
    "rope, partial": partial(rope_case, 2, 37, 2, 3, 80, 32, shared=False),
    "rope, normed": partial(rope_case, 2, 37, 2, 3, 64, norms=True),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    case = COMPILED[name](dtype=BF16, device=CUDA)
    expected = case.outcome(case.kernel, case.inputs)
    compiled = torch.compile(case.kernel, fullgraph=True, dynamic=dynamic)
    actual = case.outcome(compiled, case.inputs)
    for key, value in expected.items():
        if "norm" in name and key in (
            "gradient 2",
            "gradient 3",
            "gradient 4",
        ):  # a sum over programs, in another order
            assert distance(actual[key], value) < 2**-8
        else:
            assert torch.equal(actual[key], value), key


@pytest.mark.parametrize(
    ("name", "reentrant"), [*((name, False) for name in ODD), *((name, True) for name in list(ODD)[::7])]
)
def test_made_again(name: str, reentrant: bool) -> None:
    case = ODD[name](dtype=BF16, device=CUDA)
    expected = case.outcome(case.kernel, case.inputs)

    def again(*inputs: Any) -> Any:
        return checkpoint(case.kernel, *inputs, use_reentrant=reentrant)

    if not reentrant:
        assert_equal(case.outcome(again, case.inputs), expected)
        return
    out = again(*case.inputs)  # which knows no torch.autograd.grad
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    first = case.outcome(case.kernel, case.inputs)
    for i, o in enumerate(outs):
        assert torch.equal(o, first[f"output {i}"])
    sum(o.float().square().sum() for o in outs).backward()
    gradients = [x.grad for x in case.inputs if x is not None and x.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


# --- models

CONFIG = {
    "vocab_size": 1009,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
ADAPTERS = {
    "all": {"r": 8},
    "some": {"r": 8, "targets": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 24}},
}


def _models(seed: int, lora: dict[str, Any] | None) -> dict[str, Any]:
    """Our model on the kernels and on torch, with adapters also joined, all bf16; and in float64."""
    hf, ours = twins(LlamaForCausalLM, tiny(LlamaConfig, **CONFIG), seed)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim == 2:  # rows of 512 rather than 32
                parameter.mul_(0.25)
    del hf
    ours = ours.bfloat16().cuda().train()
    if lora is not None:
        torch.manual_seed(seed)
        apply_lora(ours, LoRAConfig(**lora), ours.state_dict_adapter.layout)
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
    models = {"kernels": ours, "torch": copy.deepcopy(ours)}
    if lora is not None:
        models["joined"] = copy.deepcopy(ours)
        join_adapters(models["joined"])
        assert any(getattr(module, "joined", None) is not None for module in models["joined"].modules())
    _on_torch(models["torch"])
    models["exact"] = copy.deepcopy(models["torch"]).double()
    models["exact"].set_attn_implementation("eager")
    return models


def _on_torch(model: Any) -> None:
    model.backend.kernels = "torch"
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = False
        if hasattr(module, "_fuses"):
            module._fuses = lambda x: False


def _step(model: Any, seed: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 1009, (3, 67), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :9] = -100
    model.zero_grad()
    loss = next_token_loss(model, {"input_ids": ids.cuda(), "labels": labels})
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    return {"loss": loss.detach(), **{name: gradient.clone() for name, gradient in gradients.items()}}


@pytest.mark.parametrize("adapters", [None, *ADAPTERS])
def test_a_bf16_model_is_no_further_from_float64_than_with_torch(
    adapters: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    errors: dict[str, list[float]] = {}
    for seed in range(6):
        models = _models(seed, None if adapters is None else ADAPTERS[adapters])
        truth = _step(models.pop("exact"), seed)
        for name, model in models.items():
            calls.clear()
            outcome = _step(model, seed)
            # the head's loss needs no adapters, the norms' kernels no linear layers
            assert bool(calls) == (name != "torch"), (name, calls)
            away = [distance(value, truth[key]) for key, value in outcome.items() if key != "loss"]
            errors.setdefault(name, []).append(sum(away) / len(away))
            errors.setdefault(f"{name}, loss", []).append(distance(outcome["loss"], truth["loss"]))
    means = {name: sum(each) / len(each) for name, each in errors.items()}
    print(f"\n  {means}")
    for name in ("kernels", "joined") if adapters else ("kernels",):
        assert 0 < means[name] <= 1.05 * means["torch"], means
        assert means[f"{name}, loss"] < 1e-3


@pytest.mark.parametrize("options", LEARNT, ids=str)
def test_what_adapters_learn_at_first_is_not_lost_in_rounding(options: dict[str, bool]) -> None:
    """Of an update below half of a bf16 step; of peft's 0.06 is left."""
    assert learnt("cuda", **options) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("dora", [False, True])
def test_compiled_layers_do_not_lose_it_either(dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRALinear, "forward", torch.compile(LoRALinear.forward))
    assert learnt("cuda", dora=dora) == pytest.approx(1, abs=0.2)


FUSED: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "phi3": (Phi3ForCausalLM, Phi3Config, {"pad_token_id": 0}),
    "glm": (GlmForCausalLM, GlmConfig, {"head_dim": 64, "pad_token_id": 0}),
    "cohere": (CohereForCausalLM, CohereConfig, {"pad_token_id": 0}),
}
"""Families whose checkpoints keep rows in another order than the fused projections."""


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("family", FUSED)
def test_adapters_of_families_with_orders_of_their_own(family: str, joined: bool) -> None:
    """In fp32, beside torch's operations on separate A and B."""
    hf_class, config, options = FUSED[family]
    _, ours = twins(hf_class, tiny(config, **{**CONFIG, **options}))
    ours = ours.cuda().train()
    apply_lora(ours, LoRAConfig(r=8), ours.state_dict_adapter.layout)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.02)
    plain = copy.deepcopy(ours)
    if joined:
        join_adapters(ours)
    _on_torch(plain)
    expected = _step(plain, 0)
    for name, value in _step(ours, 0).items():
        # fp32 sums in other orders, through softmax of large scores: 1.05e-4 was seen
        assert_near(value, expected[name], 2e-4, what=name)


class _Apart(torch.autograd.Function):
    """The identity, whose gradient has its rows apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        wide = grad.new_full((*grad.shape[:-1], grad.shape[-1] + 8), 7.0)
        wide[..., :-8] = grad
        return wide[..., :-8]


def test_attention_takes_gradients_however_they_lie() -> None:
    """cuDNN's backward pass would read them as if they lay as the output does."""
    model = _models(0, None)["kernels"]
    expected = _step(model, 0)
    for layer in model.model.layers:
        project = layer.self_attn.o_proj.forward
        layer.self_attn.o_proj.forward = lambda x, project=project: project(_Apart.apply(x))
    actual = _step(model, 0)
    for name, value in expected.items():  # the embedding's gradient is summed by atomics in any order
        assert distance(actual[name], value) < 2**-8, name


def test_everything_of_the_model_is_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    model = _models(0, ADAPTERS["all"])["joined"]
    _step(model, 0)
    layers = len(model.model.layers)
    assert calls["norm"] == 2 * layers + 1
    assert calls["rope"] == layers
    assert calls["linear"] == 4 * layers  # where the gated kernel runs
    assert calls["loss"] == 1


@pytest.mark.parametrize("adapters", [None, "all"])
def test_a_model_made_again_has_the_same_gradients(adapters: str | None) -> None:
    models = _models(0, None if adapters is None else ADAPTERS[adapters])
    model = models["kernels" if adapters is None else "joined"]
    model.set_attn_implementation("eager")
    expected = _step(model, 0)
    model.gradient_checkpointing_enable()
    actual = _step(model, 0)
    for name, value in expected.items():
        # the embedding's gradient is summed by atomics in any order
        assert distance(actual[name], value) < (2**-8 if "embed" in name else 1e-6), name


def test_bits_are_the_same_twice() -> None:
    model = _models(0, ADAPTERS["all"])["joined"]
    model.set_attn_implementation("eager")
    assert_equal(_step(model, 0), _step(model, 0))


def test_generation_with_a_cache() -> None:
    model: nn.Module = _models(0, ADAPTERS["all"])["joined"].eval()
    ids = torch.randint(3, 1009, (1, 12), device=CUDA)
    with torch.no_grad():
        longer = model.generate(ids, max_new_tokens=8, do_sample=False)
        whole = model(longer, use_cache=False).logits.float()
        step = model(longer[:, :-1], use_cache=True)
        last = model(longer[:, -1:], past_key_values=step.past_key_values).logits.float()
    # bf16's roundings in other products' shapes
    assert distance(last[:, -1], whole[:, -1]) < 0.03
