"""Products with a frozen weight in float8 (e4m3: 4 exponent bits, 3 of mantissa; Micikevicius et al. 2022,
arXiv:2209.05433), scaled row by row.

A weight ``[out, in]`` is kept once, with a scale for every row. Forward, the input's rows are scaled and rounded too.
Backward, a weight's scales belong to the columns of the output's gradient: they are multiplied into it before its own
rows are scaled, so that no second copy of the weight, scaled the other way, is needed.
"""

from functools import cache

import torch
from torch import Tensor

from nemo_automodel.components.kernels.launch import INTERPRETED, jit, operator, power_of_two, runs_on, tl, wrapped

FLOAT8 = torch.float8_e4m3fn
HIGHEST = 448.0
"""The largest number of the format."""

LONGEST = 65536
"""Channels of a row that one program can hold."""


def quantized_reference(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantized` in plain operations."""
    wide = x.float() if columns is None else x.float() * columns
    scale = (wide.abs().amax(1, keepdim=True) / HIGHEST).clamp(min=1e-30)
    return (wide / scale).clamp(-HIGHEST, HIGHEST).to(FLOAT8), scale


def quantized(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``x`` ``[rows, n]`` in float8, and its rows' scales, fp32 ``[rows, 1]``: the product of the two is about ``x``.

    Args:
        x: channels next to each other.
        columns: fp32 ``[n]``, multiplied into ``x`` first.
    """
    if runs_on(x) and not INTERPRETED and x.shape[1] <= LONGEST:
        return quantize(x, columns)
    return quantized_reference(x, columns)


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``(a * a_scale) @ (b * b_scale).T``, added up in fp32.

    Args:
        a: float8 ``[m, k]``.
        a_scale: fp32 ``[m, 1]``.
        b: float8 ``[n, k]``.
        b_scale: fp32 ``[n, 1]``; None: ones.
        dtype: of the result.
    """
    b_scale = b.new_ones((b.shape[0], 1), dtype=torch.float32) if b_scale is None else b_scale
    if a.is_cuda:
        return torch._scaled_mm(a, b.t(), a_scale, b_scale.t(), out_dtype=dtype, use_fast_accum=True)
    return ((a.float() * a_scale) @ (b.float() * b_scale).t()).to(dtype)


def unrounded(x: Tensor) -> torch.dtype:
    """In which `product` gives row-wise scaled products of ``x``: fp32 where torch can, else that of ``x``.

    On GPUs cuBLAS alone can: Hopper, CUDA 12.9 or later.
    """
    return torch.float32 if not x.is_cuda or _by_cublas(x.device) else x.dtype


@cache
def _by_cublas(device: torch.device) -> bool:
    cuda = tuple(int(n) for n in (torch.version.cuda or "0").split(".")[:2])
    return torch.cuda.get_device_capability(device)[0] == 9 and cuda >= (12, 9)


def transposed(weight: Tensor) -> Tensor:
    """A contiguous ``[n, m]`` from a float8 ``[m, n]``."""
    return transpose(weight) if weight.is_cuda else weight.view(torch.uint8).t().contiguous().view(FLOAT8)


@jit
def float8_quantize_kernel(  # type: ignore[no-untyped-def]
    X, COLUMNS, OUT, SCALE, n, x_stride, HIGHEST: tl.constexpr, WITH_COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < n
    x = tl.load(X + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    if WITH_COLUMNS:
        x *= tl.load(COLUMNS + cols, mask=inside, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(x), 0) / HIGHEST, 1e-30)
    x = x / scale
    x = tl.where(x == x, tl.minimum(tl.maximum(x, -HIGHEST), HIGHEST), x)  # what is not a number stays that
    tl.store(OUT + row * n + cols, x.to(OUT.dtype.element_ty), mask=inside)
    tl.store(SCALE + row, scale)


@jit
def float8_transpose_kernel(X, OUT, m, n, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    cols = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = (rows[:, None] < m) & (cols[None, :] < n)
    tile = tl.load(X + rows[:, None] * n + cols[None, :], mask=inside, other=0)
    across = (cols[:, None] < n) & (rows[None, :] < m)
    tl.store(OUT + cols[:, None] * m + rows[None, :], tl.trans(tile), mask=across)


@operator("nemo_automodel::float8_quantize", mutates_args={})
def quantize(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """`quantized` by the kernel."""
    count, n = x.shape
    out = torch.empty((count, n), dtype=FLOAT8, device=x.device)
    scale = torch.empty((count, 1), dtype=torch.float32, device=x.device)
    block = power_of_two(n)
    if count:
        wrapped(float8_quantize_kernel)[(count,)](
            x, scale if columns is None else columns, out, scale, n, x.stride(0), HIGHEST=HIGHEST,
            WITH_COLUMNS=columns is not None, BLOCK=block, num_warps=min(32, max(4, block // 1024)),
        )  # fmt: skip
    return out, scale


@operator("nemo_automodel::float8_transpose", mutates_args={})
def transpose(weight: Tensor) -> Tensor:
    """`transposed` by the kernel."""
    m, n = weight.shape
    out = torch.empty((n, m), dtype=torch.uint8, device=weight.device)
    tile = 128
    wrapped(float8_transpose_kernel)[(-(-m // tile), -(-n // tile))](
        weight.view(torch.uint8), out, m, n, TILE=tile, num_warps=8
    )
    return out.view(FLOAT8)
