"""``act(gate) * up`` straight on the interleaved output of ``gate_up_proj`` (Shazeer 2020, arXiv:2002.05202).

The channels of that output alternate ``gate_0, up_0, gate_1, up_1, ...``: a thread that loads neighbours has both, so
the kernels read and write whole cache lines where two strided views would touch every line twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_automodel.components.kernels.launch import (
    INTERPRETED,
    jit,
    operator,
    power_of_two,
    rows,
    runs_on,
    tl,
    wrapped,
)

ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}
"""Those the kernels have, by transformers' names."""

BLOCK = 1024
TILE = (16, 64, 4)
"""Rows, pairs and warps of the backward kernel that takes adapters' products on its way (16 rows are the least)."""
STRETCH = 512
"""Rows that one of those programs goes through, adding up."""
FORWARD_TILE, FORWARD_STRETCH = (16, 128, 4), 2048
"""The same of the forward kernel, and pairs that one of its programs goes through."""
ON_THE_WAY = True
"""Whether that kernel takes the product, too, or leaves it to be done afterwards."""
HIGH_RANK, HIGH_PAIRED = 128, 32
"""Above them the products' operands are too much for a program."""


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
def gated_low_rank_forward_kernel(  # type: ignore[no-untyped-def]
    GATE_UP, OUT, A, SUMS, count, width, rank, in_stride, out_stride, a_stride,
    KIND: tl.constexpr, RANK: tl.constexpr, STRETCH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """ROWS of STRETCH pairs, BLOCK at a time; their part of OUT @ A^T goes to SUMS."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    there, r = row < count, tl.arange(0, RANK)
    stop = tl.minimum(width, (tl.program_id(1) + 1) * STRETCH)
    cols = tl.program_id(1) * STRETCH + tl.arange(0, BLOCK)[None, :]
    pairs = tl.program_id(1) * (2 * STRETCH) + tl.arange(0, 2 * BLOCK)[None, :]
    sums = tl.zeros((ROWS, RANK), dtype=tl.float32)
    both = tl.load(GATE_UP + row * in_stride + pairs, mask=there & (pairs < 2 * stop), other=0.0)
    for _ in range(0, STRETCH, BLOCK):
        pairs += 2 * BLOCK  # the next ones are on their way while these are computed
        following = tl.load(GATE_UP + row * in_stride + pairs, mask=there & (pairs < 2 * stop), other=0.0)
        a = tl.load(A + r[:, None] * a_stride + cols, mask=(r[:, None] < rank) & (cols < stop), other=0.0)
        gate, up = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
        active, _ = _activated(gate.to(tl.float32), KIND)
        out = (active * up.to(tl.float32)).to(OUT.dtype.element_ty)
        tl.store(OUT + row * out_stride + cols, out, mask=there & (cols < stop))
        if WIDE:  # interpreted, where bit patterns would be multiplied
            sums += tl.dot(out.to(tl.float32), tl.trans(a).to(tl.float32), input_precision="ieee")
        else:
            sums = tl.dot(out, tl.trans(a), sums, input_precision="ieee")
        cols += BLOCK
        both = following
    at = (tl.program_id(1) * tl.cast(count, tl.int64) + row) * rank + r[None, :]
    tl.store(SUMS + at, sums, mask=there & (r[None, :] < rank))


@jit
def gated_backward_kernel(  # type: ignore[no-untyped-def]
    GRAD, GATE_UP, GRAD_GATE_UP, OUT, width, grad_stride, in_stride, out_stride,
    KIND: tl.constexpr, WITH_OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, BLOCK)
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    pairs = block * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    both = tl.load(GATE_UP + row * in_stride + pairs, mask=pairs < 2 * width, other=0.0)
    grad = tl.load(GRAD + row * grad_stride + cols, mask=cols < width, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(both, (BLOCK, 2)))
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    active, slope = _activated(gate, KIND)
    grads = tl.reshape(tl.join(grad * up * slope, grad * active), (2 * BLOCK,))
    tl.store(GRAD_GATE_UP + row * 2 * width + pairs, grads.to(GRAD_GATE_UP.dtype.element_ty), mask=pairs < 2 * width)
    if WITH_OUT:
        tl.store(OUT + row * out_stride + cols, (active * up).to(OUT.dtype.element_ty), mask=cols < width)


@jit
def gated_low_rank_backward_kernel(  # type: ignore[no-untyped-def]
    GRAD, GATE_UP, GRAD_GATE_UP, LEFT, RIGHT, SUMS, T, PAIR_SUMS, count, width, rank, of_gate, of_up,
    grad_stride, in_stride, left_stride, right_stride, t_stride,
    KIND: tl.constexpr, RANK: tl.constexpr, PAIRED: tl.constexpr, STRETCH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """BLOCK pairs of STRETCH rows, ROWS at a time: LEFT @ RIGHT is added to GRAD, LEFT^T @ out goes to SUMS.

    PAIRED: T's first columns^T @ the gates' gradients, its other ones^T @ the ups', go to PAIR_SUMS.
    """
    pairs = tl.program_id(0) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)[None, :]
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    r = tl.arange(0, RANK)
    right = tl.load(RIGHT + r[:, None] * right_stride + cols, mask=(r[:, None] < rank) & (cols < width), other=0.0)
    sums = tl.zeros((RANK, BLOCK), dtype=tl.float32)
    row = (tl.program_id(1) * STRETCH + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    stop = tl.minimum(count, (tl.program_id(1) + 1) * STRETCH)
    there = row < stop
    both, grad, left = _operands(
        GATE_UP, GRAD, LEFT, row, there, pairs, cols, r[None, :], width, rank, in_stride, grad_stride, left_stride
    )
    if PAIRED:
        p = tl.arange(0, PAIRED)
        gate_sums = tl.zeros((PAIRED, BLOCK), dtype=tl.float32)
        up_sums = tl.zeros((PAIRED, BLOCK), dtype=tl.float32)
        t_gate, t_up = _halves(T, row, there, p[None, :], of_gate, of_up, t_stride)
    for _ in range(0, STRETCH, ROWS):
        # the next rows are on their way while these are computed
        after = row + ROWS
        there = after < stop
        next_both, next_grad, next_left = _operands(
            GATE_UP, GRAD, LEFT, after, there, pairs, cols, r[None, :], width, rank, in_stride, grad_stride, left_stride
        )
        gate, up = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
        gate, up = gate.to(tl.float32), up.to(tl.float32)
        active, slope = _activated(gate, KIND)
        out = (active * up).to(GATE_UP.dtype.element_ty)
        grad = grad.to(tl.float32)
        if WIDE:  # interpreted, where bit patterns would be multiplied
            grad += tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
        else:
            grad += tl.dot(left, right, input_precision="ieee")
        sums = _add_product(sums, left, out, WIDE)
        of_gates = (grad * up * slope).to(GRAD_GATE_UP.dtype.element_ty)
        of_ups = (grad * active).to(GRAD_GATE_UP.dtype.element_ty)
        grads = tl.reshape(tl.join(of_gates, of_ups), (ROWS, 2 * BLOCK))
        tl.store(GRAD_GATE_UP + row * 2 * width + pairs, grads, mask=(row < stop) & (pairs < 2 * width))
        if PAIRED:
            gate_sums = _add_product(gate_sums, t_gate, of_gates, WIDE)
            up_sums = _add_product(up_sums, t_up, of_ups, WIDE)
            t_gate, t_up = _halves(T, after, there, p[None, :], of_gate, of_up, t_stride)
        row, both, grad, left = after, next_both, next_grad, next_left
    at = (tl.program_id(1) * rank + r[:, None]).to(tl.int64) * width + cols
    tl.store(SUMS + at, sums, mask=(r[:, None] < rank) & (cols < width))
    if PAIRED:
        at = (tl.program_id(1) * (of_gate + of_up) + p[:, None]).to(tl.int64) * width + cols
        tl.store(PAIR_SUMS + at, gate_sums, mask=(p[:, None] < of_gate) & (cols < width))
        at += tl.cast(of_gate, tl.int64) * width
        tl.store(PAIR_SUMS + at, up_sums, mask=(p[:, None] < of_up) & (cols < width))


@jit
def _operands(  # type: ignore[no-untyped-def]
    GATE_UP, GRAD, LEFT, row, there, pairs, cols, r, width, rank, in_stride, grad_stride, left_stride
):
    both = tl.load(GATE_UP + row * in_stride + pairs, mask=there & (pairs < 2 * width), other=0.0)
    grad = tl.load(GRAD + row * grad_stride + cols, mask=there & (cols < width), other=0.0)
    return both, grad, tl.load(LEFT + row * left_stride + r, mask=there & (r < rank), other=0.0)


@jit
def _halves(T, row, there, p, of_gate, of_up, t_stride):  # type: ignore[no-untyped-def]
    at = T + row * t_stride + p
    gates = tl.load(at, mask=there & (p < of_gate), other=0.0)
    return gates, tl.load(at + of_gate, mask=there & (p < of_up), other=0.0)


@jit
def _add_product(sums, left, right, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """``sums + left^T @ right``; interpreted (WIDE), bit patterns would be multiplied."""
    if WIDE:
        return sums + tl.dot(tl.trans(left).to(tl.float32), right.to(tl.float32), input_precision="ieee")
    return tl.dot(tl.trans(left), right, sums, input_precision="ieee")


@operator("nemo_automodel::gated_forward", mutates_args={"out"})
def gated_forward(gate_up: Tensor, out: Tensor, activation: int) -> None:
    """`gated` of ``[rows, 2 * width]`` into ``out`` ``[rows, width]``, whose rows may lie apart."""
    count, width = out.shape
    if out.numel():
        grid = (count * -(-width // BLOCK),)
        wrapped(gated_forward_kernel)[grid](
            gate_up, out, width, gate_up.stride(0), out.stride(0), KIND=activation, BLOCK=BLOCK, num_warps=4
        )


def gated_low_rank_forward(gate_up: Tensor, out: Tensor, activation: int, a: Tensor) -> Tensor:
    """`gated_forward`, and ``out @ a^T`` ``[rows, r]``, for which ``out`` would otherwise be read again.

    No operator of torch, which would take longer to call than the kernel to launch.

    Args:
        gate_up: ``[rows, 2 * width]``.
        out: ``[rows, width]``, whose rows may lie apart.
        activation: a value of `ACTIVATIONS`.
        a: ``[r, width]``.
    """
    (count, width), rank = out.shape, a.shape[0]
    if rank > HIGH_PAIRED or not out.numel() or not ON_THE_WAY:
        gated_forward(gate_up, out, activation)
        return out @ a.t()
    tile, block, warps = FORWARD_TILE
    splits = -(-width // FORWARD_STRETCH)
    sums = torch.empty((splits, count, rank), dtype=torch.float32, device=out.device)
    gated_low_rank_forward_kernel[(-(-count // tile), splits)](
        gate_up, out, a, sums, count, width, rank, gate_up.stride(0), out.stride(0), a.stride(0),
        KIND=activation, RANK=max(16, power_of_two(rank)), STRETCH=FORWARD_STRETCH, ROWS=tile, BLOCK=block,
        WIDE=INTERPRETED, num_warps=warps,
    )  # fmt: skip
    return sums.sum(0).to(out.dtype)


@operator("nemo_automodel::gated_backward", mutates_args={"out"})
def gated_backward(grad: Tensor, gate_up: Tensor, out: Tensor | None, activation: int) -> Tensor:
    """Gradient of ``gate_up`` ``[rows, 2 * width]``, interleaved like it.

    Args:
        grad: ``[rows, width]``, of the gated activation.
        gate_up: its input.
        out: where there, gets `gated` itself once more.
        activation: a value of `ACTIVATIONS`.
    """
    count, width = grad.shape
    grad_gate_up = torch.empty((count, 2 * width), dtype=gate_up.dtype, device=gate_up.device)
    if grad.numel():
        wrapped(gated_backward_kernel)[(count * -(-width // BLOCK),)](
            grad, gate_up, grad_gate_up, grad_gate_up if out is None else out, width,
            *(0 if x is None else x.stride(0) for x in (grad, gate_up, out)),
            KIND=activation, WITH_OUT=out is not None, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return grad_gate_up


def gated_low_rank_backward(
    grad: Tensor,
    gate_up: Tensor,
    activation: int,
    left: Tensor,
    right: Tensor,
    t: Tensor | None = None,
    of_gate: int = 0,
    of_up: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_backward` of ``grad + left @ right``, and ``left^T @ gated(gate_up)`` as fp32 ``[r, width]``.

    That is what adapters on the layer that reads the activation need of it, in one pass: ``left`` ``[rows, r]`` is the
    gradient of what A gave, ``right`` ``[r, width]`` is A, and the product is A's gradient.

    The layer that made ``gate_up`` may have adapters, too. With what their A gave, ``t`` ``[rows, of_gate + of_up]``,
    the third result is ``t^T`` times the gradients of gates, then of ups, the gradients of their B: fp32
    ``[stretches, of_gate + of_up, width]``, to be added up. Else it is empty, as for ranks above `HIGH_PAIRED`.
    """
    (count, width), rank = grad.shape, right.shape[0]
    if rank > HIGH_RANK or not grad.numel():
        out = grad.new_empty(grad.shape)
        grad_gate_up = gated_backward(torch.addmm(grad, left, right), gate_up, out, activation)
        return grad_gate_up, (left.t() @ out).float(), grad.new_empty(0, dtype=torch.float32)
    grad_gate_up = torch.empty((count, 2 * width), dtype=gate_up.dtype, device=gate_up.device)
    tile, block, warps = TILE
    splits = -(-count // STRETCH)
    sums = torch.empty((splits, rank, width), dtype=torch.float32, device=grad.device)
    paired = 0 if t is None or max(of_gate, of_up) > HIGH_PAIRED else max(16, power_of_two(max(of_gate, of_up)))
    pair_sums = sums.new_empty((splits, of_gate + of_up, width) if paired else 0)
    gated_low_rank_backward_kernel[(-(-width // block), splits)](
        grad, gate_up, grad_gate_up, left, right, sums, left if t is None else t, pair_sums, count, width, rank,
        of_gate, of_up, grad.stride(0), gate_up.stride(0), left.stride(0), right.stride(0),
        0 if t is None else t.stride(0),
        KIND=activation, RANK=max(16, power_of_two(rank)), PAIRED=paired, STRETCH=STRETCH, ROWS=tile, BLOCK=block,
        WIDE=INTERPRETED, num_warps=warps,
    )  # fmt: skip
    return grad_gate_up, sums.sum(0), pair_sums


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
