"""A rank's own random numbers, and those that all have in common, from a GPU's generator."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_automodel.components.distributed.draws import common_draws, own_draws

pytestmark = pytest.mark.gpu


def _rank(number: int) -> Any:
    return SimpleNamespace(device_type="cuda", size=lambda: 2, get_local_rank=lambda: number)


def _drawn(number: int) -> list[Tensor]:
    torch.manual_seed(0)
    draw = lambda: torch.rand(1000, device="cuda")  # noqa: E731
    with own_draws(_rank(number)):
        drawn = [draw()]
        with common_draws(_rank(number)):
            drawn.append(draw())
        drawn.append(draw())
    return [*drawn, draw()]


def test_own_and_common_numbers() -> None:
    zero, again, one = _drawn(0), _drawn(0), _drawn(1)
    assert all(torch.equal(a, b) for a, b in zip(zero, again, strict=True))
    assert [torch.equal(a, b) for a, b in zip(zero, one, strict=True)] == [False, True, False, True]
    assert len({tuple(each.tolist()) for each in (*zero, *one)}) == 6
