"""Linear layers that make their input again, with adapters and without, interpreted: against float64."""

import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from nemo_automodel.components.distributed.parallelize import _keep_costly
from nemo_automodel.components.kernels import gated as gated_module
from nemo_automodel.components.kernels import linear as linear_module
from nemo_automodel.components.kernels.add_norm import add_norm_reference
from nemo_automodel.components.kernels.float8 import FLOAT8, unrounded
from nemo_automodel.components.kernels.gated import gated, gated_reference
from nemo_automodel.components.kernels.launch import runs_on
from nemo_automodel.components.kernels.linear import Gated, Linear, Normed, Pairs, can_run, linear, takes_gated
from nemo_automodel.components.layout import GATE_UP
from tests.components.kernels.cases import (
    ADAPTED,
    BF16,
    EPS,
    FP32,
    LINEARS,
    QKV,
    Case,
    assert_equal,
    assert_graph_rules,
    assert_near,
    assert_noticed,
    counted,
    linear_case,
    made,
    mlp_case,
    rows_of,
    values,
)

pytestmark = pytest.mark.interpreted
LONG = pytest.mark.slow


@pytest.mark.parametrize(
    ("compute", "cuda", "dtype"),
    [
        ((9, 0), "13.0", FP32),
        ((9, 0), "12.9", FP32),
        ((9, 0), "12.8", BF16),
        ((8, 9), "13.0", BF16),
        ((10, 0), "13.0", BF16),
    ],
)
def test_products_of_float8_are_not_rounded_where_torch_can(
    compute: tuple[int, int], cuda: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: compute)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    x: Any = SimpleNamespace(is_cuda=True, device=(compute, cuda), dtype=BF16)  # asked once for each device
    assert unrounded(x) == dtype
    assert unrounded(torch.empty(1, dtype=BF16)) == FP32


CHANCE = 1.5
"""Ratio of the errors in bf16: some roundings each, in tensors of a few hundred numbers."""


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", LINEARS)
def test_layers(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    assert_near(linear_case((3, 5), 24, **LINEARS[name], dtype=dtype))
    assert calls.get("linear", 0) == (0 if "plain" in name else 1)  # torch's own serves a plain one


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("name", ADAPTED)
def test_adapters(name: str, joined: bool, dtype: torch.dtype) -> None:
    assert_near(linear_case((3, 7), 40, joined=joined, **ADAPTED[name], dtype=dtype), CHANCE)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_over_weights_in_float8(name: str, dtype: torch.dtype) -> None:
    """Near what rounds the same operands and is exact but for that: one that was not rounded would be 3% away."""
    case = linear_case((3, 7), 40, **ADAPTED[name], float8=True, dtype=dtype)
    assert any(x is not None and x.dtype == FLOAT8 for x in case.inputs)
    assert_near(case, CHANCE)


@pytest.mark.parametrize("room", [16, 24, 40])
def test_adapters_in_the_room_beside_a_norm(room: int) -> None:
    """Of rank 24; where the room is too small, or wider than needed."""
    ranks = {"gate_proj": 8, "up_proj": 16}
    assert_near(
        linear_case((2, 5), 40, recipe="normed", ranks=ranks, fusion=GATE_UP, joined=True, room=room, dtype=FP32)
    )


@pytest.mark.parametrize("rank", [1, 3, 17])
@pytest.mark.parametrize("recipe", [None, "silu", "normed"])
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
def test_ranks_whatever_they_are(rank: int, recipe: str | None, joined: bool) -> None:
    assert_near(linear_case((5,), 37, recipe=recipe, ranks={"o_proj": rank}, joined=joined, dtype=FP32))


@pytest.mark.parametrize("rows", [(1,), (0,), (2, 0), (1, 1), (33,)])
@pytest.mark.parametrize("recipe", [None, "silu", "normed"])
def test_rows(rows: tuple[int, ...], recipe: str | None) -> None:
    for options in ({}, {"ranks": {"o_proj": 4}}, {"ranks": {"o_proj": 4}, "joined": True, "room": 4}):
        assert_near(linear_case(rows, 24, recipe=recipe, **options, dtype=FP32))


@pytest.mark.parametrize("tile", [(16, 16, 1), (16, 128, 4), (64, 32, 8)])
@pytest.mark.parametrize("stretch", [64, 128])
def test_tiles(tile: tuple[int, int, int], stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernel that takes the adapters' products on its way."""
    monkeypatch.setattr(gated_module, "TILE", tile)
    monkeypatch.setattr(gated_module, "STRETCH", stretch)
    assert_near(linear_case((70,), 70, recipe="silu", ranks={"down_proj": 5}, dtype=FP32))


@pytest.mark.parametrize("fusion", [GATE_UP, QKV], ids=["gate_up", "qkv"])
def test_the_rows_of_parts_are_the_layouts(fusion: Any) -> None:
    """What the tests above take for them."""
    for part in fusion.parts:
        fused = torch.arange(40.0)[:, None]
        assert torch.equal(fusion.view(fused, part).flatten(), rows_of(fusion, part, 40).float())


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
def test_two_calls_of_a_layer_before_their_backward_passes(joined: bool) -> None:
    """A joined layer writes B beside its weight at each."""
    case = linear_case((5,), 24, ranks={"gate_proj": 4, "up_proj": 4}, fusion=GATE_UP, joined=joined, dtype=FP32)
    x, *parameters = case.inputs
    other = values(7, 24, dtype=FP32)
    adapters = parameters[2:]
    apart = [torch.autograd.grad(case.kernel(one, *parameters).square().sum(), adapters) for one in (x, other)]
    together = [case.kernel(one, *parameters).square().sum() for one in (x, other)]
    with torch.no_grad():
        case.kernel(other, *parameters)
    actual = torch.autograd.grad(together[0] + together[1], adapters)
    for a, b, c in zip(actual, *apart, strict=True):
        torch.testing.assert_close(a, b + c, rtol=2**-18, atol=2**-18)


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
def test_two_layers_that_read_one_norm(joined: bool) -> None:
    """Both write into the room beside its rows."""
    adapters = {"ranks": {"o_proj": 8}, "joined": joined, "room": 8}
    one, other = (linear_case((5,), 24, recipe="normed", **adapters, dtype=FP32) for _ in range(2))
    given = one.inputs[:3]
    layers = [case.kernel.__closure__ for case in (one, other)]
    first, second = (next(c.cell_contents for c in cells if isinstance(c.cell_contents, nn.Module)) for cells in layers)

    def both(function: Any) -> list[Tensor]:
        total, x = function()
        out = first(x).square().sum() + second(x).square().sum() + total.square().sum()
        wanted = [
            *given,
            *first.lora_A.values(),
            *first.lora_B.values(),
            *second.lora_A.values(),
            *second.lora_B.values(),
        ]
        return [out.detach(), *torch.autograd.grad(out, wanted)]

    actual = both(lambda: made(given, "normed", 8))
    expected = both(lambda: add_norm_reference(*given, EPS, 1.0))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-16, atol=2**-16)


def test_a_norm_that_is_changed_in_place_is_no_norm() -> None:
    case = linear_case((5,), 24, recipe="normed", dtype=FP32)
    results = []
    for function in (
        lambda: made(case.inputs[:3], "normed", 0),
        lambda: add_norm_reference(*case.inputs[:3], EPS, 1.0),
    ):
        _, x = function()
        x.mul_(2)
        out = linear(x, case.inputs[3])
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), case.inputs[:4])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-16, atol=2**-16)


@pytest.mark.parametrize("recipe", ["silu", "normed"])
def test_the_rules_of_autograd(recipe: str) -> None:
    for options in ({}, {"ranks": {"o_proj": 4}}, {"ranks": {"o_proj": 4}, "joined": True, "room": 4}):
        assert_graph_rules(linear_case((3,), 8, recipe=recipe, **options, dtype=FP32))


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
def test_a_step_between_forward_and_backward_is_noticed(joined: bool) -> None:
    adapters = {"ranks": {"o_proj": 4}, "joined": joined}
    for changed in (0, 3, 4):  # x, A, B
        assert_noticed(linear_case((3,), 8, **adapters, dtype=FP32), changed)
    assert_noticed(linear_case((3,), 8, recipe="silu", **adapters, dtype=FP32), 0)
    assert_noticed(linear_case((3,), 8, recipe="normed", **adapters, dtype=FP32), 2)
    assert_noticed(linear_case((3,), 8, recipe="normed", **adapters, dtype=FP32), 0, outcome=True)
    for recipe in ("silu", "normed"):
        weight = 1 if recipe == "silu" else 3
        assert_noticed(linear_case((3,), 8, recipe=recipe, dtype=FP32), weight)


def _recipes(dtype: torch.dtype) -> list[tuple[Any, Tensor]]:
    """Inputs that are made again, and as ordinary tensors."""
    gate_up, x = values(5, 48, dtype=dtype), values(5, 24, dtype=dtype)
    marked = x * 1
    rstd, weight = torch.ones(5), values(24, dtype=dtype)
    Normed(marked, weight, rstd, 1e-5, 0.0).mark(marked)
    return [(Gated(gate_up, "silu"), gated_reference(gate_up, "silu")), (marked, x)]


def test_float64_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    weight = values(7, 24, dtype=torch.float64)
    for x, tensor in _recipes(torch.float64):
        assert not can_run(x, weight)
        torch.testing.assert_close(linear(x, weight), F.linear(tensor, weight))
    assert not calls


def test_autocast_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    weight = values(7, 24, dtype=FP32)
    for x, tensor in _recipes(FP32):
        with torch.autocast("cpu", dtype=BF16):
            assert not can_run(x, weight)
            actual, expected = linear(x, weight), F.linear(tensor, weight)
        assert actual.dtype == BF16
        torch.testing.assert_close(actual, expected)
        actual.float().sum().backward()
    assert "linear" not in calls


def test_dtypes_that_differ_go_to_torch() -> None:
    x, weight = values(5, 24, dtype=BF16), values(7, 24, dtype=FP32)
    assert not can_run(x, weight)
    assert can_run(x, weight.bfloat16(), None)
    assert not can_run(x, weight.bfloat16(), values(7, dtype=FP32))
    assert not runs_on(torch.zeros(3, dtype=torch.int64))


def test_who_takes_what_is_not_made_yet() -> None:
    """Not torch's class, nor one with a hook, which would see no tensor."""
    assert not takes_gated(nn.Linear(4, 4))
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        layer = Linear(4, 4)
        assert takes_gated(layer)
        handle = getattr(layer, register)(lambda *args: None)
        assert not takes_gated(layer)
        handle.remove()
        assert takes_gated(layer)


def test_what_is_kept() -> None:
    """The residual stream, the fused projection's output: not the input, nor anything else as wide."""
    kept: list[Tensor] = []
    case = linear_case((3, 5), 24, recipe="normed", ranks={"o_proj": 4}, joined=True, room=4, dtype=FP32)
    gate_up, weight = values(15, 48, dtype=FP32), values(7, 24, dtype=FP32, grad=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        total, _ = case.kernel(*case.inputs)
        linear(Gated(gate_up, "silu"), weight)
    wide = {t.untyped_storage().data_ptr() for t in kept if t.numel() >= 15 * 24 and t is not weight}
    allowed = [total, gate_up, weight, *(x for x in case.inputs[3:] if x is not None)]
    assert wide <= {t.untyped_storage().data_ptr() for t in allowed}
    assert {t.untyped_storage().data_ptr() for t in (total, gate_up)} <= wide


def test_gated_made_again_is_gated() -> None:
    x = Gated(values(5, 48, dtype=FP32), "silu")
    assert torch.equal(x.made(), gated(x.gate_up, "silu"))


def test_bits_are_the_same_twice() -> None:
    case: Case = linear_case((33,), 40, recipe="silu", ranks={"down_proj": 8}, joined=True, dtype=BF16)
    assert_equal(case.outcome(case.kernel, case.inputs), case.outcome(case.kernel, case.inputs))


def _taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether B's gradients came with the gradient of gate and up, from now on."""
    taken, take = [], Pairs.take
    monkeypatch.setattr(Pairs, "take", lambda self, grad: taken.append((sums := take(self, grad)) is not None) or sums)
    return taken


RANKS = [{"gate_proj": 8, "up_proj": 16}, {"gate_proj": 32, "up_proj": 3}, {"up_proj": 33}]


@pytest.mark.parametrize(
    ("ranks", "dtype"),
    [
        (RANKS[0], BF16),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in itertools.product(RANKS, (BF16, FP32))),
    ],
)
def test_adapters_of_gate_and_up_get_their_gradient_from_the_next_layer(
    ranks: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the rank that a program holds; over several stretches of rows."""
    monkeypatch.setattr(gated_module, "STRETCH", 16)
    taken = _taken(monkeypatch)
    for joined in (False, True):
        case = mlp_case(3, 7, hidden=64, ranks=ranks, joined=joined and sum(ranks.values()) % 8 == 0, dtype=dtype)
        assert_near(case, CHANCE)
        assert_equal(case.outcome(case.kernel, case.inputs), case.outcome(case.kernel, case.inputs))
    assert all(taken) if max(ranks.values()) <= 32 else not any(taken)
    assert taken


@pytest.mark.parametrize("change", ["another reader", pytest.param("a hook", marks=LONG), "a hook in place"])
def test_a_gradient_that_is_another_by_then_is_multiplied_itself(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = mlp_case(5, ranks=RANKS[0], dtype=FP32).layers
    taken = _taken(monkeypatch)

    def outcome(changed: bool) -> list[Tensor]:
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        gate_up = layers[0](x)
        other = gate_up.square().sum() if change == "another reader" else 0.0
        if change == "a hook":
            gate_up.register_hook(lambda grad: 2 * grad)
        if change == "a hook in place":
            gate_up.register_hook(lambda grad: grad.mul_(2))
        source = gate_up if changed else gate_up.view_as(gate_up)  # which nothing hangs on
        loss = layers[1](Gated(source, "silu")).square().sum() + other
        return list(torch.autograd.grad(loss, [x, *layers[0].lora_A.values(), *layers[0].lora_B.values()]))

    for one, other in zip(outcome(True), outcome(False), strict=True):
        torch.testing.assert_close(one, other)
    assert not any(taken)
    assert len(taken) == 2


@pytest.mark.parametrize("name", ["plain", "gated", "normed gate_up"])
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
def test_an_input_that_needs_no_gradient_gets_none(name: str, joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product with the weight is then not done: of frozen embeddings, in the first layer."""
    monkeypatch.setattr(linear_module, "_base_gradient", None)
    case = linear_case((3, 7), 40, dtype=FP32, joined=joined, room=32, **ADAPTED[name])
    given = 3 if name.startswith("normed") else 1
    case.inputs[:given] = [x if x is None else x.detach() for x in case.inputs[:given]]
    assert_near(case)


SELECTIVE: dict[str, Any] = {
    "plain, bias": partial(linear_case, (3, 5), 40, **ADAPTED["plain, bias"]),
    "normed qkv, bias": partial(linear_case, (3, 5), 40, **ADAPTED["normed qkv, bias"]),
    "normed gate_up": partial(linear_case, (3, 5), 40, joined=True, room=32, **ADAPTED["normed gate_up"]),
    "MLP": partial(mlp_case, 3, 7, ranks=RANKS[0]),
    "joined MLP": partial(mlp_case, 3, 7, ranks=RANKS[0], joined=True),
}


@pytest.mark.parametrize("name", [*list(SELECTIVE)[:-1], pytest.param("joined MLP", marks=LONG)])
def test_selective_checkpointing(name: str) -> None:
    """It keeps products, which nobody may change after them: neither seen by it, nor unseen by a kernel."""
    case = SELECTIVE[name](dtype=FP32)
    expected = case.outcome(case.kernel, case.inputs)
    contexts = partial(create_selective_checkpoint_contexts, _keep_costly)
    again = partial(checkpoint, case.kernel, use_reentrant=False, context_fn=contexts)
    assert_equal(case.outcome(again, case.inputs), expected)
