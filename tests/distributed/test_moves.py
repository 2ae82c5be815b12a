"""Ranks' tensors moved by collectives of our own choice, beside DTensor: values and gradients, compiled ones too."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from nemo_automodel.components.distributed import moves
from nemo_automodel.components.distributed.moves import CHANNELS, SEQUENCE, TERM, WHOLE, moved
from tests.distributed.ranks import run_ranks

WAYS: list[tuple[Any, Any, dict[str, Any]]] = [
    (WHOLE, WHOLE, {"term": True}),
    (WHOLE, SEQUENCE, {}),
    (WHOLE, CHANNELS, {}),
    (SEQUENCE, WHOLE, {"term": True}),
    (SEQUENCE, WHOLE, {}),
    (CHANNELS, WHOLE, {"term": True}),
    (CHANNELS, WHOLE, {"width": 12}),
    (TERM, WHOLE, {}),
    (TERM, SEQUENCE, {}),
    (SEQUENCE, CHANNELS, {}),
]


def _with_gradient(function: Any, x: Tensor, *way: Any, **options: Any) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    output = function(leaf * 2, *way, **options) * 3
    weights = torch.linspace(-1, 1, output.numel()).reshape(output.shape) * (1 + dist.get_rank())
    (output * weights).sum().backward()
    assert leaf.grad is not None
    return [output.detach(), leaf.grad]


def _beside_dtensor(compiled: bool) -> None:
    mesh, torch_moves = init_device_mesh("cpu", (2,)), moves._by_dtensor
    by_us = torch.compile(moved, backend="aot_eager", dynamic=False) if compiled else moved
    for rows in (1, 2):
        for given, wanted, options in WAYS:
            torch.manual_seed(0 if given == WHOLE else dist.get_rank())
            x = torch.randn(rows, 8, 6)
            one = _with_gradient(by_us, x, mesh, given, wanted, **options)
            all_options = {"term": False, "width": None, **options}
            other = _with_gradient(torch_moves, x, mesh, given, wanted, **all_options)
            for which, a, b in zip(("value", "gradient"), one, other, strict=True):
                assert torch.equal(a, b), f"{which} of {rows} rows, {given} to {wanted} {options}"


@pytest.mark.ranks
@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients_are_dtensors(compiled: bool) -> None:
    run_ranks(2, _beside_dtensor, compiled)


def _own_storage() -> None:
    x = torch.randn(1, 8, 6)
    part = moved(x, init_device_mesh("cpu", (2,)), WHOLE, SEQUENCE)
    assert part.is_contiguous()
    assert part.untyped_storage().nbytes() == part.nbytes


@pytest.mark.ranks
def test_a_part_does_not_keep_the_whole() -> None:
    run_ranks(2, _own_storage)
