"""All adapters of one layer where its products read them, and their gradients back: a launch for each way.

A fused projection has an A and a B for every part. The products take the A one below the other, and the B times their
scales in the fused rows, each part in columns of its own. As operations of torch that is a small kernel for every part,
some thirty a layer and step, which take longer to launch than to run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from nemo_automodel.components.kernels.adamw import queued
from nemo_automodel.components.kernels.launch import INTERPRETED, jit, power_of_two, runs_on, tl

BLOCK = 2048
"""Elements of a parameter that one program moves."""
TILE, HIGHEST_RANK = (64, 128, 4), 128
"""Rows, columns and warps of a program that adds a product; the ranks up to which it does."""


@dataclass(frozen=True)
class Place:
    """Where the rows of one parameter stand in the matrix of all.

    Row ``i`` is row ``i // block * group + start + i % block`` there, from ``column`` on.

    Attributes:
        rows, columns: the parameter's shape.
        block: rows that stay together.
        group: rows from one block to the next.
        start: row of the first one.
        column: of its first.
        scale: a factor on the way in, and on the gradient.
        is_b: which of the two matrices.
    """

    rows: int
    columns: int
    block: int
    group: int
    start: int = 0
    column: int = 0
    scale: float = 1.0
    is_b: bool = False


def pack(parameters: Sequence[Tensor], places: Sequence[Place], all_a: Tensor, all_b: Tensor) -> None:
    """Every parameter into its place in ``all_a`` ``[r, in]`` or ``all_b`` ``[out, r]``, whose rows may lie apart.

    Args:
        parameters: contiguous, in the dtype of both matrices.
        places: of each.
        all_a: every element is written.
        all_b: where no parameter has its place, it stays as it is.
    """
    table, scales, owners = _table(tuple(places), all_b.device)
    addresses = _addresses(tuple(parameter.data_ptr() for parameter in parameters), all_b.device)
    low_rank_pack_kernel[(len(owners),)](
        addresses, table, scales, owners, all_a, all_b, all_a.stride(0), all_b.stride(0), BLOCK=BLOCK, num_warps=4
    )


def unpack(
    all_a: Tensor, all_b: Tensor, places: Sequence[Place], columns: Tensor | None, offset: float, like: Tensor
) -> list[Tensor]:
    """The gradient of each parameter, out of those of the two matrices.

    Args:
        all_a: ``[r, in]``, in any dtype.
        all_b: ``[out, r]``.
        places: of each parameter.
        columns: ``[in]``; with it those of ``all_a`` are multiplied by ``columns + offset``.
        offset: as said.
        like: has the dtype of the gradients, which share one piece of memory.
    """
    table, scales, owners = _table(tuple(places), all_b.device)
    sizes = [place.rows * place.columns for place in places]
    whole = torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
    low_rank_unpack_kernel[(len(owners),)](
        table, scales, owners, all_a, all_b, all_b if columns is None else columns, whole,
        all_a.stride(0), all_b.stride(0), offset, WITH_COLUMNS=columns is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return [part.view(p.rows, p.columns) for part, p in zip(whole.split(sizes), places, strict=True)]


# A row of the table: elements (0), first program (1), first element of all (2), columns (3), block (4), group (5),
# start (6), column (7), is_b (8). OWNERS: each program's row. Nothing here waits for the device.


@lru_cache(maxsize=4096)  # the same in every step, unless FSDP gathers parameters elsewhere
def _addresses(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    return queued(torch.tensor(addresses, dtype=torch.int64), device)


@lru_cache(maxsize=4096)
def _table(places: tuple[Place, ...], device: torch.device) -> tuple[Tensor, ...]:
    sizes = [place.rows * place.columns for place in places]
    programs = [-(-size // BLOCK) for size in sizes]
    firsts, elements = accumulate(programs, initial=0), accumulate(sizes, initial=0)
    table = [
        [size, first, element, p.columns, p.block, p.group, p.start, p.column, int(p.is_b)]
        for p, size, first, element in zip(places, sizes, firsts, elements, strict=False)
    ]
    owners = torch.repeat_interleave(torch.arange(len(places), dtype=torch.int32), torch.tensor(programs))
    scales = torch.tensor([place.scale for place in places], dtype=torch.float32)
    return queued(torch.tensor(table, dtype=torch.int64), device), queued(scales, device), queued(owners, device)


@jit
def _place(TABLE, SCALES, OWNERS, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row of the table, elements of the parameter, which of them there are; row and column of their place."""
    owner = tl.load(OWNERS + tl.program_id(0))
    entry = TABLE + owner * 9
    first, width, block = tl.load(entry + 1).to(tl.int32), tl.load(entry + 3).to(tl.int32), tl.load(entry + 4)
    at = (tl.program_id(0) - first) * BLOCK + tl.arange(0, BLOCK)
    line, column = at // width, at % width + tl.load(entry + 7)
    block = block.to(tl.int32)
    row = (line // block).to(tl.int64) * tl.load(entry + 5) + tl.load(entry + 6) + line % block
    return owner, entry, tl.load(SCALES + owner), at, at < tl.load(entry), row, column


@jit
def low_rank_pack_kernel(  # type: ignore[no-untyped-def]
    ADDRESSES, TABLE, SCALES, OWNERS, ALL_A, ALL_B, a_stride, b_stride, BLOCK: tl.constexpr
):
    owner, entry, scale, at, inside, row, column = _place(TABLE, SCALES, OWNERS, BLOCK)
    source = tl.load(ADDRESSES + owner).to(tl.pointer_type(ALL_A.dtype.element_ty))
    value = (tl.load(source + at, mask=inside, other=0.0).to(tl.float32) * scale).to(ALL_A.dtype.element_ty)
    if tl.load(entry + 8) == 1:
        tl.store(ALL_B + row * b_stride + column, value, mask=inside)
    else:
        tl.store(ALL_A + row * a_stride + column, value, mask=inside)


@jit
def low_rank_unpack_kernel(  # type: ignore[no-untyped-def]
    TABLE, SCALES, OWNERS, ALL_A, ALL_B, COLUMNS, WHOLE, a_stride, b_stride, offset,
    WITH_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, entry, scale, at, inside, row, column = _place(TABLE, SCALES, OWNERS, BLOCK)
    if tl.load(entry + 8) == 1:
        value = tl.load(ALL_B + row * b_stride + column, mask=inside, other=0.0).to(tl.float32)
    else:
        value = tl.load(ALL_A + row * a_stride + column, mask=inside, other=0.0).to(tl.float32)
        if WITH_COLUMNS:
            value *= tl.load(COLUMNS + column, mask=inside, other=0.0).to(tl.float32) + offset
    out = WHOLE + tl.load(entry + 2)
    tl.store(out + at, (value * scale).to(WHOLE.dtype.element_ty), mask=inside)


def add_product(x: Tensor, left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x + left @ right + bias`` into ``out``, rounded once: bound by their memory, of which ``addmm`` uses half.

    No operator of torch, which would take longer to call than the kernel to launch.

    Args:
        x: ``[rows, n]``, whose rows may lie apart; also in fp32 where all others are in less.
        left: ``[rows, r]``, likewise.
        right: ``[r, n]``, with any strides.
        out: ``[rows, n]``, or ``x`` itself.
        bias: ``[n]``.
    """
    (count, width), rank = x.shape, right.shape[0]
    exact = left.dtype == torch.float32 and not INTERPRETED  # such products want registers
    if exact or rank > HIGHEST_RANK or not runs_on(x):
        if x.dtype == left.dtype:
            total = torch.addmm(x, left, right, out=out)
        elif x.is_cuda:
            total = torch.addmm(x, left, right, out_dtype=x.dtype)
        else:
            total = torch.addmm(x, left.to(x.dtype), right.to(x.dtype))
        return out.copy_(total if bias is None else total.add_(bias))
    if x.numel():
        tile, block, warps = TILE
        add_product_kernel[(-(-count // tile) * -(-width // block),)](
            x, out, left, right, right if bias is None else bias, count, width, rank,
            x.stride(0), out.stride(0), left.stride(0), right.stride(0), right.stride(1),
            RANK=max(16, power_of_two(rank)), ROWS=tile, BLOCK=block, WIDE=INTERPRETED, WITH_BIAS=bias is not None,
            num_warps=warps,
        )  # fmt: skip
    return out


@jit
def add_product_kernel(  # type: ignore[no-untyped-def]
    X, OUT, LEFT, RIGHT, BIAS, count, width, rank, x_stride, out_stride, left_stride, right_stride, right_step,
    RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, WITH_BIAS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    r = tl.arange(0, RANK)
    inside = (row < count) & (cols < width)
    total = tl.load(X + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    left = tl.load(LEFT + row * left_stride + r[None, :], mask=(row < count) & (r[None, :] < rank), other=0.0)
    there = RIGHT + r[:, None].to(tl.int64) * right_stride + cols.to(tl.int64) * right_step
    right = tl.load(there, mask=(r[:, None] < rank) & (cols < width), other=0.0)
    if WIDE:  # interpreted, where bit patterns would be multiplied
        total += tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        total += tl.dot(left, right, input_precision="ieee")
    if WITH_BIAS:
        total += tl.load(BIAS + cols, mask=cols < width, other=0.0).to(tl.float32)
    tl.store(OUT + row * out_stride + cols, total.to(OUT.dtype.element_ty), mask=inside)
