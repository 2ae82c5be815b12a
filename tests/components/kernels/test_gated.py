"""The gated activation, interpreted: against float64, whatever the launch is."""

from typing import Any

import pytest
import torch

from nemo_automodel.components.kernels import gated as kernels
from nemo_automodel.components.kernels.gated import ACTIVATIONS, gated, gated_forward, gated_reference
from tests.components.kernels.cases import (
    BF16,
    FP32,
    assert_equal,
    assert_graph_rules,
    assert_near,
    assert_noticed,
    gated_case,
    values,
)

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 1, 1300), (1, 1024)])
@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
def test_near_float64(shape: tuple[int, ...], activation: str, dtype: torch.dtype, strided: bool) -> None:
    assert_near(gated_case(*shape, activation=activation, strided=strided, dtype=dtype))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    assert_near(gated_case(*shape, dtype=FP32))


@pytest.mark.filterwarnings("ignore:overflow")
def test_gates_far_from_zero() -> None:
    """Where exponentials are infinite or nothing."""
    gate = torch.tensor([-6e4, -300.0, -90.0, -20.0, 0.0, 20.0, 90.0, 300.0, 6e4])
    for activation in ACTIVATIONS:
        results = []
        for function, dtype in ((gated, FP32), (gated_reference, torch.float64)):
            x = torch.stack((gate, torch.full_like(gate, 0.5)), -1).flatten()[None].to(dtype).requires_grad_()
            out = function(x, activation)
            out.sum().backward()
            results.append((out.detach().double(), x.grad.double()))
        for actual, expected in zip(*results, strict=True):
            # t = tanh is 1 - 2^-24 or 1, where its derivative is a difference of the two
            torch.testing.assert_close(actual, expected, rtol=2**-20, atol=2**-18)


@pytest.mark.parametrize("block", [1, 8, 4096])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = gated_case(2, 19, dtype=BF16)
    expected = case.outcome(case.kernel, case.inputs)
    monkeypatch.setattr(kernels, "BLOCK", block)
    assert_equal(case.outcome(case.kernel, case.inputs), expected)


def test_what_lies_around_stays() -> None:
    around = torch.full((7, 50), 7.0)
    gated_forward(values(5, 74, dtype=FP32, grad=False), around[1:-1, 3:40], 0)
    assert (around[1:-1, 3:40] != 7).all()
    around[1:-1, 3:40] = 7
    assert (around == 7).all()


def test_a_gradient_without_strides() -> None:
    case = gated_case(2, 5, 37, dtype=FP32)
    (x,) = case.inputs
    sums = [
        torch.autograd.grad(case.kernel(x), x, ones)[0]
        for ones in (torch.ones(2, 5, 37), torch.ones(1, 1, 1).expand(2, 5, 37))
    ]
    assert torch.equal(*sums)


def test_the_rules_of_autograd() -> None:
    assert_graph_rules(gated_case(3, 8, dtype=FP32))
    assert_noticed(gated_case(3, 8, dtype=FP32), changed=0)


def test_what_the_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("the kernel was asked")

    monkeypatch.setattr(kernels, "gated_forward", never)
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(gated(x, "silu"), gated_reference(x, "silu"))
    assert gated(torch.empty(3, 8, device="meta"), "silu").shape == (3, 4)
    with pytest.raises(KeyError, match="relu"):
        gated(x, "relu")


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("rank", [5, 130])
def test_products_are_taken_on_its_way(rank: int, rows: int) -> None:
    """Of any rank: above 128 by themselves, for the kernel cannot hold them."""
    torch.manual_seed(0)
    grad, gate_up = torch.randn(rows, 37), torch.randn(rows, 74)
    left, right = torch.randn(rows, rank), torch.randn(rank, 37)
    exact = gate_up.double().requires_grad_()
    out = gated_reference(exact, "silu")
    out.backward(grad.double() + left.double() @ right.double())
    assert exact.grad is not None
    actual, sums, _ = kernels.gated_low_rank_backward(grad, gate_up, 0, left, right)
    assert (actual - exact.grad).norm() <= 1e-6 * exact.grad.norm()  # fp32 sums of 130 terms
    expected = left.double().t() @ out.detach()
    assert sums.dtype == FP32
    assert (sums - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("rows", [0, 33])
@pytest.mark.parametrize("rank", [5, 33])
def test_a_product_is_taken_on_the_way_forward(rank: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several stretches of columns; of ranks above 32 by itself. What lies beside the rows stays."""
    monkeypatch.setattr(kernels, "FORWARD_STRETCH", 64)
    monkeypatch.setattr(kernels, "FORWARD_TILE", (16, 16, 1))
    torch.manual_seed(0)
    gate_up, a = torch.randn(rows, 2 * 130), torch.randn(rank, 130)
    room = torch.full((rows, 140), 7.0)
    t = kernels.gated_low_rank_forward(gate_up, room[:, :130], 0, a)
    out = gated_reference(gate_up.double(), "silu")
    assert torch.equal(room[:, 130:], torch.full((rows, 10), 7.0))
    assert (room[:, :130] - out).norm() <= 1e-6 * out.norm()
    expected = out @ a.double().t()
    assert t.shape == expected.shape
    assert (t - expected).norm() <= 1e-6 * expected.norm()  # fp32 sums of 130 terms
