"""``act(gate) * up`` straight on the interleaved output of ``gate_up_proj`` (Shazeer 2020, arXiv:2002.05202).

The channels of that output alternate ``gate_0, up_0, gate_1, up_1, ...``: a thread that loads neighbours has both, so
the kernels read and write whole cache lines where two strided views would touch every line twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_automodel.components.kernels.launch import INTERPRETED, jit, power_of_two, rows, runs_on, tl, wrapped

ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}
"""Those the kernels have, by transformers' names."""

BLOCK = 1024
TILE, TILE_WARPS = (16, 128), 4
"""Rows and pairs of the backward kernel's programs where it takes a product on its way (16 rows are the least)."""
HIGH_RANK = 128
"""Above it the product's operands are too much for a program."""


def gated_reference(gate_up: Tensor, activation: str) -> Tensor:
    """``[..., 2 * width] -> [..., width]`` in plain operations, one rounding at the end."""
    gate, up = gate_up.unflatten(-1, (-1, 2)).unbind(-1)
    wide = torch.promote_types(gate.dtype, torch.float32)
    gate = gate.to(wide)
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return (active * up.to(wide)).to(gate_up.dtype)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """``act(gate) * up``: ``[..., 2 * width] -> [..., width]``, computed in fp32 and rounded once.

    Args:
        gate_up: interleaved channels, on any device; a kernel runs where it can, else `gated_reference`.
        activation: one of `ACTIVATIONS`.

    Raises:
        KeyError: another activation.
    """
    code = ACTIVATIONS[activation]
    return _Gated.apply(gate_up, code) if runs_on(gate_up) else gated_reference(gate_up, activation)


@jit
def _tanh(x):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * x) - 1


@jit
def _activated(gate, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation and its derivative."""
    if KIND == 0:
        s = tl.sigmoid(gate)
        return gate * s, s * (1 + gate * (1 - s))
    inner = 0.7978845608028654 * gate * (1 + 0.044715 * gate * gate)  # sqrt(2 / pi) (x + 0.044715 x^3)
    t = _tanh(inner)
    slope = 0.7978845608028654 * (1 + 3 * 0.044715 * gate * gate)
    return 0.5 * gate * (1 + t), 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * slope


@jit
def gated_forward_kernel(GATE_UP, OUT, width, in_stride, out_stride, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    blocks = tl.cdiv(width, BLOCK)
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    pairs = block * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    both = tl.load(GATE_UP + row * in_stride + pairs, mask=pairs < 2 * width, other=0.0)
    gate, up = tl.split(tl.reshape(both, (BLOCK, 2)))
    active, _ = _activated(gate.to(tl.float32), KIND)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + row * out_stride + cols, (active * up.to(tl.float32)).to(OUT.dtype.element_ty), mask=cols < width)


@jit
def gated_backward_kernel(  # type: ignore[no-untyped-def]
    GRAD, GATE_UP, GRAD_GATE_UP, OUT, LEFT, RIGHT, count, width, rank, grad_stride, in_stride, out_stride,
    left_stride, right_stride,
    KIND: tl.constexpr, WITH_OUT: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS x BLOCK pairs; with RANK, LEFT @ RIGHT is added to GRAD first."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    block = tl.program_id(0) % blocks
    pairs = block * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)[None, :]
    cols = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    two, one = (row < count) & (pairs < 2 * width), (row < count) & (cols < width)
    both = tl.load(GATE_UP + row * in_stride + pairs, mask=two, other=0.0)
    grad = tl.load(GRAD + row * grad_stride + cols, mask=one, other=0.0).to(tl.float32)
    if RANK > 0:
        r = tl.arange(0, RANK)
        left = tl.load(LEFT + row * left_stride + r[None, :], mask=(row < count) & (r[None, :] < rank), other=0.0)
        right = tl.load(RIGHT + r[:, None] * right_stride + cols, mask=(r[:, None] < rank) & (cols < width), other=0.0)
        if WIDE:  # interpreted, where bit patterns would be multiplied
            left, right = left.to(tl.float32), right.to(tl.float32)
        grad += tl.dot(left, right, input_precision="ieee")
    gate, up = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    active, slope = _activated(gate, KIND)
    grads = tl.reshape(tl.join(grad * up * slope, grad * active), (ROWS, 2 * BLOCK))
    tl.store(GRAD_GATE_UP + row * 2 * width + pairs, grads.to(GRAD_GATE_UP.dtype.element_ty), mask=two)
    if WITH_OUT:
        tl.store(OUT + row * out_stride + cols, (active * up).to(OUT.dtype.element_ty), mask=one)


@torch.library.triton_op("nemo_automodel::gated_forward", mutates_args={"out"})
def gated_forward(gate_up: Tensor, out: Tensor, activation: int) -> None:
    """`gated` of ``[rows, 2 * width]`` into ``out`` ``[rows, width]``, whose rows may lie apart."""
    count, width = out.shape
    if out.numel():
        grid = (count * -(-width // BLOCK),)
        wrapped(gated_forward_kernel)[grid](
            gate_up, out, width, gate_up.stride(0), out.stride(0), KIND=activation, BLOCK=BLOCK, num_warps=4
        )


@torch.library.triton_op("nemo_automodel::gated_backward", mutates_args={"out"})
def gated_backward(
    grad: Tensor,
    gate_up: Tensor,
    out: Tensor | None,
    activation: int,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """Gradient of ``gate_up`` ``[rows, 2 * width]``, interleaved like it.

    Args:
        grad: ``[rows, width]``, of the gated activation.
        gate_up: its input.
        out: where there, gets `gated` itself once more.
        activation: a value of `ACTIVATIONS`.
        left: ``[rows, r]``; with it ``left @ right`` is added to ``grad``.
        right: ``[r, width]``.
    """
    if left is not None and right is not None and right.shape[0] > HIGH_RANK:
        grad, left, right = torch.addmm(grad, left, right), None, None
    count, width = grad.shape
    grad_gate_up = torch.empty((count, 2 * width), dtype=gate_up.dtype, device=gate_up.device)
    rank = 0 if left is None or right is None else max(16, power_of_two(right.shape[0]))
    tile, block = (1, BLOCK) if rank == 0 else TILE
    if grad.numel():
        wrapped(gated_backward_kernel)[(-(-count // tile) * -(-width // block),)](
            grad, gate_up, grad_gate_up, grad_gate_up if out is None else out, grad if left is None else left,
            grad if right is None else right, count, width, 0 if right is None else right.shape[0],
            *(0 if x is None else x.stride(0) for x in (grad, gate_up, out, left, right)),
            KIND=activation, WITH_OUT=out is not None, RANK=rank, ROWS=tile, BLOCK=block, WIDE=INTERPRETED,
            num_warps=TILE_WARPS if rank else 4,
        )  # fmt: skip
    return grad_gate_up


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: int) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        out = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
        gated_forward(rows(gate_up), rows(out), activation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        return gated_backward(rows(grad), rows(gate_up), None, ctx.activation).view_as(gate_up), None
