"""The residual stream with its norm, interpreted: against float64, whatever the launch is."""

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nemo_automodel.components.kernels import add_norm as kernels
from nemo_automodel.components.kernels.add_norm import add_norm, add_norm_forward, add_norm_reference
from tests.components.kernels.cases import (
    BF16,
    EPS,
    FP32,
    assert_equal,
    assert_graph_rules,
    assert_near,
    assert_noticed,
    norm_case,
    values,
)

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_reference_is_transformers(offset: float) -> None:
    norm = (GemmaRMSNorm if offset else LlamaRMSNorm)(37, EPS).double()
    torch.nn.init.normal_(norm.weight)
    x, branch = torch.randn(2, 5, 37).double()
    total, normed = add_norm_reference(x, branch, norm.weight, EPS, offset)
    torch.testing.assert_close(total, x + branch)
    # theirs takes the mean square in fp32
    torch.testing.assert_close(normed, norm(x + branch).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 37), (2, 3, 1300), (1, 512)])
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no branch"])
def test_near_float64(shape: tuple[int, ...], branch: bool, dtype: torch.dtype) -> None:
    assert_near(norm_case(*shape, branch=branch, dtype=dtype))
    assert_near(norm_case(*shape, branch=branch, offset=1.0, strided=True, dtype=dtype))
    assert_near(norm_case(*shape, branch=branch, frozen=True, dtype=dtype))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    assert_near(norm_case(*shape, dtype=FP32))


def test_a_weight_in_fp32_is_not_rounded() -> None:
    x, weight = values(3, 40, dtype=BF16), values(40, dtype=FP32)
    _, normed, _ = add_norm(x, None, weight, EPS, 1.0)
    _, expected = add_norm_reference(x.double(), None, weight.double(), EPS, 1.0)
    normed.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == FP32
    assert (normed.double() / expected - 1).abs().max() < 2**-8 + 2**-20  # one rounding


@pytest.mark.parametrize("count", [1, 2, 100])
def test_the_weights_gradient_over_programs(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS_PER_PROCESSOR", count)
    assert_near(norm_case(7, 37, dtype=FP32))


@pytest.mark.parametrize("wanted", ["total", "normed"])
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no branch"])
def test_one_output_may_be_left_alone(wanted: str, branch: bool) -> None:
    case = norm_case(5, 37, branch=branch, dtype=FP32)
    for name in ("kernel", "reference"):
        function = getattr(case, name)
        setattr(case, name, lambda *inputs, f=function: f(*inputs)[0 if wanted == "total" else 1])
    if wanted == "total":
        assert case.inputs[2] is not None
        case.inputs[2].requires_grad_(False)
    assert_near(case)


def test_room_beside_the_rows() -> None:
    case = norm_case(2, 5, 37, dtype=BF16)
    total, normed, rstd = add_norm(*case.inputs, EPS)
    roomy = add_norm(*case.inputs, EPS, room=11)
    assert rstd is not None
    assert roomy[2] is not None
    assert roomy[1].stride() == (5 * 48, 48, 1)
    assert roomy[1].untyped_storage().nbytes() == 2 * 10 * 48
    for actual, expected in zip(roomy, (total, normed, rstd), strict=True):
        assert torch.equal(actual, expected)
    grads = [torch.autograd.grad(n.float().square().sum(), case.inputs) for n in (normed, roomy[1])]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_without_a_branch_the_stream_is_the_same_memory() -> None:
    x, _, weight = norm_case(5, 37, branch=False, dtype=FP32).inputs
    assert add_norm(x, None, weight, EPS)[0].data_ptr() == x.data_ptr()


def test_what_lies_around_stays() -> None:
    around = torch.full((7, 50), 7.0)
    x, _, weight = (None if v is None else v.detach() for v in norm_case(5, 37, branch=False, dtype=FP32).inputs)
    add_norm_forward(x, None, weight, None, around[1:-1, 3:40], None, EPS, 0.0)
    assert (around[1:-1, 3:40] != 7).all()
    around[1:-1, 3:40] = 7
    assert (around == 7).all()


def test_gradients_without_strides() -> None:
    case = norm_case(2, 5, 37, dtype=FP32)
    dense = [torch.ones(2, 5, 37)] * 2
    expanded = [torch.ones(1, 1, 1).expand(2, 5, 37)] * 2
    grads = [torch.autograd.grad(case.kernel(*case.inputs), case.inputs, ones) for ones in (dense, expanded)]
    assert_equal(dict(enumerate(grads[1])), dict(enumerate(grads[0])))


@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no branch"])
def test_the_rules_of_autograd(branch: bool) -> None:
    assert_graph_rules(norm_case(3, 8, branch=branch, dtype=FP32))
    assert_noticed(norm_case(3, 8, branch=branch, dtype=FP32), changed=2)
    assert_noticed(norm_case(3, 8, dtype=FP32), changed=0, outcome=True)


def test_rows_that_are_too_long_go_to_the_reference() -> None:
    x, weight = torch.randn(1, 65537), torch.randn(65537)
    _, normed, rstd = add_norm(x, None, weight, EPS)
    assert rstd is None
    assert torch.equal(normed, add_norm_reference(x, None, weight, EPS)[1])
