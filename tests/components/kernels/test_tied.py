"""The gradient of a weight that embeds tokens and is the head, interpreted: against float64, in one piece of memory."""

import pytest
import torch
from torch import Tensor, nn

from nemo_automodel.components.kernels import linear_cross_entropy as loss_module
from nemo_automodel.components.kernels import tied as kernels
from nemo_automodel.components.kernels.linear_cross_entropy import linear_cross_entropy
from nemo_automodel.components.kernels.tied import add_rows, embed_tied
from tests.components.kernels.cases import BF16, FP32, assert_equal, assert_near, tied_case

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("n", "block"), [(1, 512), (37, 16), (600, 512)])
def test_near_float64(n: int, block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens once, twice, and so often that their rows are added up in several pieces, to a multiple of them too."""
    monkeypatch.setattr(kernels, "BLOCK", block)
    ids = torch.tensor([3] * 17 + [0, 8, 8, 1, 3] + [5] * 8)[torch.randperm(30)]
    for padding in (None, 3):
        case = tied_case(ids.view(2, 15), 9, n, padding=padding, dtype=dtype)
        assert_near(case)
        assert_equal(case.outcome(case.kernel, case.inputs), case.outcome(case.kernel, case.inputs))


def test_each_use_alone() -> None:
    case = tied_case(torch.tensor([[1, 4, 1]]), 6, 8, dtype=FP32)
    for which in (0, 1):
        grads = [
            torch.autograd.grad(f(*case.inputs)[which].square().sum(), case.inputs[0])[0]
            for f in (case.kernel, case.reference)
        ]
        torch.testing.assert_close(*grads)


def test_the_heads_gradient_is_the_memory_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    made, scaled = [], loss_module.scaled
    monkeypatch.setattr(loss_module, "scaled", lambda *a: made.append(_address(out := scaled(*a))) or out)
    weight = nn.Parameter(torch.randn(6, 8))
    embeddings, head = embed_tied(torch.tensor([1, 4]), weight)
    assert head.data_ptr() == weight.data_ptr()
    linear_cross_entropy(embeddings, head, torch.tensor([4, 2])).backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() == made[1]


def _address(tensor: Tensor) -> int:
    """Without holding it: autograd would then copy it."""
    return tensor.data_ptr()


def test_what_lies_around_stays() -> None:
    around = torch.full((8, 50), 7.0)
    add_rows(torch.tensor([0, 5]), torch.tensor([1, 0]), torch.ones(2, 37), around[1:-1, 3:40], -1)
    assert around[1, 3:40].eq(8).all()
    assert around[6, 3:40].eq(8).all()
    around[[1, 6], 3:40] = 7
    assert around.eq(7).all()
