"""The head's loss, interpreted: against float64, in chunks, in parts of the vocabulary, whatever the launch is."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from nemo_automodel.components.kernels import linear_cross_entropy as kernels
from nemo_automodel.components.kernels.launch import runs_on
from nemo_automodel.components.kernels.linear import linear
from nemo_automodel.components.kernels.linear_cross_entropy import (
    IGNORE,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from nemo_automodel.verify.ranks import run_ranks
from tests.components.kernels.cases import BF16, FP32, assert_equal, assert_near, loss_case

# a lane that has seen nothing but masked logits: -inf less -inf, and not taken
pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore:invalid value encountered")]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (1, 61), (9, 61), (2, 9001)])
def test_near_float64(rows: int, vocabulary: int, frozen: bool, softcap: float | None, dtype: torch.dtype) -> None:
    for multiplier in (1.0, 0.7) if rows == 9 else (0.7,):
        case = loss_case(
            rows, 24, vocabulary, multiplier, softcap, frozen=frozen, ignored=slice(1, None, 4), dtype=dtype
        )
        assert_near(case)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_nothing_to_predict(rows: int, frozen: bool) -> None:
    case = loss_case(rows, 8, 13, frozen=frozen, ignored=slice(None), dtype=FP32)
    assert_near(case)
    outcome = case.outcome(case.kernel, case.inputs)
    assert all(value.eq(0).all() for value in outcome.values())


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    "rows", [pytest.param(128, marks=pytest.mark.slow), 129, pytest.param(257, marks=pytest.mark.slow)]
)
def test_chunks(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which have 128 rows at least; the head's gradient is summed in fp32."""
    chunked = []
    split = Tensor.split
    monkeypatch.setattr(kernels, "CHUNK_TRAINED", 1)
    monkeypatch.setattr(Tensor, "split", lambda self, *a: chunked.append(split(self, *a)) or chunked[-1])
    case = loss_case(rows, 16, 9, 0.7, 3.0, dtype=dtype)
    assert_near(case)
    assert len(chunked[0]) == -(-rows // 128)


@pytest.mark.parametrize("block", [4, 8, 64])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_blocks(block: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = loss_case(3, 16, 61, 0.7, softcap, dtype=FP32)
    expected = case.outcome(case.kernel, case.inputs)
    monkeypatch.setattr(kernels, "BLOCK", block)
    for name, value in case.outcome(case.kernel, case.inputs).items():  # sums of exponentials in another order
        torch.testing.assert_close(value, expected[name], rtol=2**-20, atol=2**-20)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits_far_apart(softcap: float | None) -> None:
    """Whose exponentials are infinite, or nothing."""
    hidden, weight, targets = (
        torch.eye(3) * torch.tensor([[1.0], [300.0], [-5e3]]),
        torch.randn(40, 3),
        torch.tensor([5, 0, 7]),
    )
    results = []
    for function, dtype in ((linear_cross_entropy, FP32), (linear_cross_entropy_reference, torch.float64)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        loss = function(*leaves, targets, softcap=softcap)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for actual, expected in zip(*results, strict=True):
        # a logit of 5000 or more is rounded to 2^-12
        torch.testing.assert_close(actual.double(), expected, rtol=2**-10, atol=2**-10)


def test_hidden_states_with_strides() -> None:
    case = loss_case(9, 16, 21, dtype=FP32)
    expected = case.outcome(case.kernel, case.inputs)
    hidden, weight = (x.detach() for x in case.inputs)
    wide = torch.cat((hidden, hidden), -1)[:, :16].requires_grad_()
    turned = weight.t().contiguous().t().requires_grad_()
    actual = case.outcome(case.kernel, [wide, turned])
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=2**-20, atol=2**-20)


def test_a_target_outside_of_the_vocabulary_makes_the_loss_nan() -> None:
    """Where torch raises on the CPU and ends the process on a GPU; the host cannot look at targets without waiting."""
    case = loss_case(3, 8, 13, dtype=FP32)
    for wrong in (13, -1, 2**40):
        targets = torch.tensor([1, wrong, IGNORE])
        assert linear_cross_entropy(*case.inputs, targets).isnan()


def test_the_rules_of_autograd() -> None:
    case = loss_case(5, 8, 13, dtype=FP32)
    hidden, weight = case.inputs
    loss = case.kernel(hidden, weight)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (hidden, weight))
    for one, three in zip(first, thrice, strict=True):
        torch.testing.assert_close(3 * one, three)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, hidden)
    (gradient,) = torch.autograd.grad(case.kernel(hidden, weight).square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    with torch.no_grad():  # where there is nothing to keep
        assert torch.equal(case.kernel(hidden, weight), loss)


def test_what_the_kernels_do_not_take() -> None:
    case = loss_case(5, 8, 13, dtype=FP32)
    mixed = [case.inputs[0].detach().double(), case.inputs[1].detach().double()]
    assert torch.equal(case.kernel(*mixed), case.reference(*mixed))


def _parts(vocabulary: int, softcap: float | None, dtype: torch.dtype) -> list[Any]:
    """On a rank: loss and gradients from its part of the vocabulary; and what sharded tensors do."""
    torch.manual_seed(0)
    case = loss_case(9, 16, vocabulary, 0.7, softcap, dtype=FP32)
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in case.inputs)
    targets = torch.randint(0, vocabulary, (9,))
    targets[2] = IGNORE
    parts = [*weight.detach().chunk(dist.get_world_size()), weight.detach()[:0]]  # torch makes fewer where few will do
    part = parts[min(dist.get_rank(), len(parts) - 1)].clone().requires_grad_()
    place = (dist.group.WORLD, vocabulary)
    loss = linear_cross_entropy(hidden, part, targets, 0.7, softcap, *place)
    grads = torch.autograd.grad(loss, (hidden, part))
    whole = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = linear_cross_entropy_reference(*whole, targets, 0.7, softcap)
    exact = [expected, *torch.autograd.grad(expected, whole)]
    outside = linear_cross_entropy(hidden, part, targets + vocabulary, 0.7, softcap, *place)

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = DTensor.from_local(weight.detach(), mesh, [Replicate()])
    rows = DTensor.from_local(hidden.detach(), mesh, [Replicate()])
    assert not runs_on(sharded)
    assert torch.equal(linear(rows, sharded).to_local(), linear(hidden, weight))
    return [x.detach().numpy() for x in (loss, *grads, *exact, outside)]


# 26 tokens over 2 ranks, 27 unevenly; 5 over 4, the last of which has none. In float64 the reference serves
@pytest.mark.parametrize(
    ("ranks", "vocabulary", "dtype"),
    [
        pytest.param(2, 26, FP32, marks=pytest.mark.slow),
        (2, 27, FP32),
        pytest.param(4, 5, FP32, marks=pytest.mark.slow),
        pytest.param(2, 27, torch.float64, marks=pytest.mark.slow),
    ],
)
def test_a_vocabulary_in_parts(ranks: int, vocabulary: int, dtype: torch.dtype) -> None:
    preload = ["torch.distributed.tensor", "tests.components.kernels.cases"]
    results = run_ranks(ranks, _parts, vocabulary, 3.0, dtype, timeout=300, preload=preload)
    found = [[torch.from_numpy(array) for array in rank] for rank in results]
    loss, grad_hidden, grad_weight = found[0][3:6]
    for rank in found:
        torch.testing.assert_close(rank[0].double(), loss, rtol=2**-20, atol=0)
        assert rank[6].isnan()
    terms, parts_of_weight = sum(rank[1] for rank in found), torch.cat([rank[2] for rank in found])
    for parts, expected in ((terms, grad_hidden), (parts_of_weight, grad_weight)):
        torch.testing.assert_close(parts.double(), expected, rtol=2**-20, atol=2**-20)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_one_kernel_does_what_the_two_do(softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit; the two serve a vocabulary in parts, and losses without gradients."""
    monkeypatch.setattr(kernels, "BLOCK", 32)
    logits, targets = torch.randn(4, 61).bfloat16(), torch.tensor([3, IGNORE, 60, 61])
    apart = logits.clone()
    maximum, total, at_target = kernels.cross_entropy_statistics(apart, targets, 0, 61, 0.7, softcap)
    lse = maximum + total.log()
    kernels.cross_entropy_gradient(apart, targets, lse, 0, 0.7, softcap)
    loss = kernels.cross_entropy(logits, targets, 0.7, softcap)
    assert torch.equal(logits, apart)
    expected = torch.where(targets != IGNORE, lse - at_target, 0.0)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)
    assert loss.isnan().tolist() == [False, False, False, True]


def test_bits_are_the_same_twice() -> None:
    case = loss_case(5, 16, 61, dtype=BF16)
    assert_equal(case.outcome(case.kernel, case.inputs), case.outcome(case.kernel, case.inputs))
