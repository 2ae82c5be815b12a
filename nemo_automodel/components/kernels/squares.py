"""The sum of squares over many tensors in one launch: torch's takes many, each with an idle end."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from nemo_automodel.components.kernels.adamw import load_as_float, owners_of, pointer_to, queued
from nemo_automodel.components.kernels.launch import jit, tl, triton

BLOCK = 8192
"""Elements that one program adds up, in fp32; the programs' sums are added up in fp64."""


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """fp64 scalar, without waiting for the device.

    Args:
        tensors: at least one, all on one device; fp32 and bf16 go through the kernel on a GPU.
    """
    kinds: dict[tuple[bool, bool], list[Tensor]] = {}
    others = []
    for tensor in (tensor for tensor in tensors if tensor.numel()):
        if triton is None or not tensor.is_cuda or tensor.dtype not in (torch.float32, torch.bfloat16):
            others.append(tensor)
        else:
            dense = tensor.contiguous()
            kinds.setdefault((dense.dtype == torch.bfloat16, dense.data_ptr() % 16 == 0), []).append(dense)
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    if others:
        norms = torch._foreach_norm(others, 2, dtype=torch.float32)
        total += torch.stack(norms).double().square().sum()
    for (half, aligned), alike in kinds.items():
        total += launch(alike, half, aligned)
    return total


def launch(tensors: Sequence[Tensor], half: bool, aligned: bool) -> Tensor:
    """`sum_of_squares` of contiguous tensors that are all bf16, or all fp32, and where 16 bytes can be read or not."""
    device = tensors[0].device
    blocks = [-(-tensor.numel() // BLOCK) for tensor in tensors]
    starts = [0, *accumulate(blocks)]
    rows = [[tensor.data_ptr(), tensor.numel(), start] for tensor, start in zip(tensors, starts, strict=False)]
    table = queued(torch.tensor(rows, dtype=torch.int64), device)
    sums = torch.empty(starts[-1], dtype=torch.float32, device=device)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        squares_kernel[(starts[-1],)](
            table, owners_of(tuple(blocks), device), sums, HALF=half, ALIGNED=aligned, BLOCK=BLOCK, num_warps=8
        )
    return sums.sum(dtype=torch.float64)


@jit
def squares_kernel(TABLE, OWNERS, SUMS, HALF: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0)
    row = TABLE + tl.load(OWNERS + block) * 3
    first = (block - tl.load(row + 2)) * BLOCK  # int64
    pointer = pointer_to(tl.load(row), HALF, ALIGNED) + first
    values = load_as_float(pointer, tl.arange(0, BLOCK), tl.load(row + 1) - first, HALF, True)
    tl.store(SUMS + block, tl.sum(values * values, 0))
