"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467, equation 4) with the residual stream that it reads.

A decoder adds a branch to the residual stream and normalises the sum; backward, the norm's gradient is added to the
stream's. One kernel does both, each way, and keeps nothing but the sum and a number per row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_automodel.components.kernels.launch import fp32, jit, operator, power_of_two, rows, runs_on, tl, wrapped

WIDEST = 65536
"""Channels of a row that one program can hold."""

PROGRAMS_PER_PROCESSOR = 8
"""Of the backward kernel, which adds up the weight's gradient over the rows that a program has."""


def add_norm_reference(
    residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`add_norm` in plain operations."""
    total = residual if branch is None else residual + branch
    wide = torch.promote_types(total.dtype, torch.float32)
    normed = F.rms_norm(total.to(wide), total.shape[-1:], weight.to(wide) + offset, eps)
    return total, normed.to(total.dtype)


def add_norm(
    residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0, room: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(residual + branch, norm(residual + branch), 1 / rms)``, the norm in fp32 and rounded once.

    Args:
        residual: ``[..., n]``, on any device; a kernel runs where it can, else `add_norm_reference`.
        branch: of the same shape; None: the residual stream as it is, which is then returned as it is.
        weight: ``[n]``.
        eps: added to the mean square.
        offset: added to the weight, in fp32.
        room: columns to leave free beside every row of the norm's output, in the same memory, by the kernel.

    Returns:
        The sum; the norm; the root mean squares' inverses, fp32 ``[rows]``, None from the reference.
    """
    # asked as the kernel asks it: where shapes are dynamic, this number is not, and dynamo must know before it goes on
    if runs_on(residual, branch, weight) and power_of_two(residual.shape[-1]) <= WIDEST:
        total, normed, rstd = _AddNorm.apply(residual, branch, weight, eps, offset, room)
        return total, normed, rstd
    return *add_norm_reference(residual, branch, weight, eps, offset), None


@jit
def add_norm_forward_kernel(  # type: ignore[no-untyped-def]
    X, BRANCH, WEIGHT, TOTAL, OUT, RSTD, n, x_stride, branch_stride, out_stride, eps, offset,
    ADD: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    eps, offset = fp32(eps), fp32(offset)
    cols = tl.arange(0, BLOCK)
    inside = cols < n
    x = tl.load(X + row * x_stride + cols, mask=inside, other=0.0)
    if ADD:
        branch = tl.load(BRANCH + row * branch_stride + cols, mask=inside, other=0.0)
        # rounded before it is normalised, as the sum that the next layer reads is
        x = (x.to(tl.float32) + branch.to(tl.float32)).to(X.dtype.element_ty)
        tl.store(TOTAL + row * n + cols, x, mask=inside)
    x = x.to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 0) / n + eps)
    weight = tl.load(WEIGHT + cols, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(OUT + row * out_stride + cols, (x * rstd * weight).to(OUT.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(RSTD + row, rstd)


@jit
def add_norm_backward_kernel(  # type: ignore[no-untyped-def]
    GRAD, GRAD_TOTAL, TOTAL, WEIGHT, RSTD, GRAD_X, GRAD_WEIGHT, count, n, grad_stride, grad_total_stride,
    total_stride, offset, WITH_TOTAL: tl.constexpr, WITH_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < n
    weight = tl.load(WEIGHT + cols, mask=inside, other=0.0).to(tl.float32) + fp32(offset)
    grad_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    row = program.to(tl.int64)
    while row < count:
        x = tl.load(TOTAL + row * total_stride + cols, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(GRAD + row * grad_stride + cols, mask=inside, other=0.0).to(tl.float32)
        normed = x * tl.load(RSTD + row)
        if WITH_WEIGHT:
            grad_weight += grad * normed
        weighted = grad * weight
        grad_x = (weighted - normed * (tl.sum(weighted * normed, 0) / n)) * tl.load(RSTD + row)
        if WITH_TOTAL:
            grad_x += tl.load(GRAD_TOTAL + row * grad_total_stride + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(GRAD_X + row * n + cols, grad_x.to(GRAD_X.dtype.element_ty), mask=inside)
        row += programs
    if WITH_WEIGHT:
        tl.store(GRAD_WEIGHT + program.to(tl.int64) * n + cols, grad_weight, mask=inside)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


@operator("nemo_automodel::add_norm_forward", mutates_args={"total", "out", "rstd"})
def add_norm_forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    total: Tensor | None,
    out: Tensor,
    rstd: Tensor | None,
    eps: float,
    offset: float,
) -> None:
    """`add_norm` of ``[rows, n]`` into ``total`` (with a branch) and ``out``; ``1 / rms`` into ``rstd`` ``[rows]``."""
    count, n = x.shape
    block = power_of_two(n)
    if count:
        wrapped(add_norm_forward_kernel)[(count,)](
            x, x if branch is None else branch, weight, x if total is None else total, out, x if rstd is None else rstd,
            n, x.stride(0), 0 if branch is None else branch.stride(0), out.stride(0), eps, offset,
            ADD=branch is not None, KEEP=rstd is not None, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip


@operator("nemo_automodel::add_norm_backward", mutates_args={})
def add_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    with_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum ``[rows, n]``, and of the weight as fp32 ``[programs, n]``, to be added up."""
    count, n = total.shape
    block = power_of_two(n)
    grad_x = torch.empty((count, n), dtype=total.dtype, device=total.device)
    processors = torch.cuda.get_device_properties(total.device).multi_processor_count if total.is_cuda else 1
    programs = min(count, processors * PROGRAMS_PER_PROCESSOR)
    partial = torch.empty((programs if with_weight else 0, n), dtype=torch.float32, device=total.device)
    if count:
        wrapped(add_norm_backward_kernel)[(programs,)](
            grad, grad if grad_total is None else grad_total, total, weight, rstd, grad_x, partial, count, n,
            grad.stride(0), 0 if grad_total is None else grad_total.stride(0), total.stride(0), offset,
            WITH_TOTAL=grad_total is not None, WITH_WEIGHT=with_weight, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return grad_x, partial


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float, offset: float, room: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        flat = rows(residual)
        total = residual if branch is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
        out = residual.new_empty((*residual.shape[:-1], residual.shape[-1] + room))
        if room:  # data: autograd would take it for a view, which must not be changed in place
            out = out[..., : residual.shape[-1]].data
        rstd = torch.empty(flat.shape[0], dtype=torch.float32, device=residual.device)
        add_norm_forward(
            flat,
            None if branch is None else rows(branch),
            weight,
            None if branch is None else rows(total),
            rows(out),
            rstd,
            eps,
            offset,
        )
        ctx.save_for_backward(total, weight, rstd)
        ctx.offset, ctx.added = offset, branch is not None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rstd)
        return total, out, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        if grad is None:
            return grad_total, grad_total if ctx.added else None, None, None, None, None
        with_weight = ctx.needs_input_grad[2]
        grad_x, partial = add_norm_backward(
            rows(grad),
            None if grad_total is None else rows(grad_total),
            rows(total),
            weight,
            rstd,
            ctx.offset,
            with_weight,
        )
        grad_x = grad_x.view(total.shape)
        grad_weight = partial.sum(0).to(weight.dtype) if with_weight else None
        return grad_x, grad_x if ctx.added else None, grad_weight, None, None, None
