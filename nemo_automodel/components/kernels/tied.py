"""Embeddings whose weight is the head's too, and one gradient for both uses.

As two uses of a parameter, autograd makes the embeddings' gradient in zeros of its own, as large as the vocabulary, and
adds it to the head's: five passes over that much memory for the few rows that a batch has.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_automodel.components.kernels.launch import jit, operator, power_of_two, rows, tl, wrapped

BLOCK, AT_ONCE = 512, 8
"""Channels of a program, and rows of the same token that it adds up at a time."""


def embed_tied(ids: Tensor, weight: Tensor, padding: int | None = None) -> tuple[Tensor, Tensor]:
    """Embeddings ``[..., n]`` of ``ids`` ``[...]``, and the weight as the head is to read it.

    The gradient for the second result is the memory in which the weight's is made: nobody else may hold it.

    Args:
        ids: int64, on the weight's device, which kernels must take.
        weight: ``[vocabulary, n]``.
        padding: token whose embedding gets no gradient.
    """
    embeddings, of_head = _EmbedTied.apply(ids, weight, -1 if padding is None else padding)
    return embeddings, of_head


@jit
def add_rows_kernel(  # type: ignore[no-untyped-def]
    IDS, ORDER, GRAD, OUT, count, n, grad_stride, out_stride, padding, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr
):
    """The first of the same sorted IDS adds up the rows of all of them, in fp32, and adds the sum to OUT's."""
    first = tl.program_id(0)
    token = tl.load(IDS + first)
    before = tl.load(IDS + first - 1, mask=first > 0, other=-1)
    if (token != before) & (token != padding):
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = first + tl.arange(0, AT_ONCE)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        found = tl.full((), AT_ONCE, dtype=tl.int32)
        while found == AT_ONCE:
            same = tl.load(IDS + at, mask=at < count, other=-1) == token
            row = tl.load(ORDER + at, mask=same, other=0)
            inside = same[:, None] & (cols < n)[None, :]
            values = tl.load(GRAD + row[:, None] * grad_stride + cols[None, :], mask=inside, other=0.0)
            total += tl.sum(values.to(tl.float32), 0)
            found = tl.sum(same.to(tl.int32), 0)
            at += AT_ONCE
        there = OUT + token * out_stride + cols
        total += tl.load(there, mask=cols < n, other=0.0).to(tl.float32)
        tl.store(there, total.to(OUT.dtype.element_ty), mask=cols < n)


@operator("nemo_automodel::add_rows", mutates_args={"out"})
def add_rows(ids: Tensor, order: Tensor, grad: Tensor, out: Tensor, padding: int) -> None:
    """Row ``order[i]`` of ``grad`` ``[rows, n]`` is added to row ``ids[i]`` of ``out``; always in the same order.

    Args:
        ids: int64 ``[rows]``, sorted.
        order: int64 ``[rows]``.
        grad: ``[rows, n]``.
        out: ``[vocabulary, n]``.
        padding: the id that is left out.
    """
    count, n = grad.shape
    if grad.numel():
        block = min(BLOCK, power_of_two(n))
        wrapped(add_rows_kernel)[(count, -(-n // block))](
            ids, order, grad, out, count, n, grad.stride(0), out.stride(0), padding,
            AT_ONCE=AT_ONCE, BLOCK=block, num_warps=4,
        )  # fmt: skip


class _EmbedTied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.shape = padding, weight.shape
        ctx.set_materialize_grads(False)
        return F.embedding(ids, weight), weight.data  # autograd would take a view for one of many outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, of_head: Tensor | None) -> tuple[None, Tensor | None, None]:
        (ids,) = ctx.saved_tensors
        if grad is not None:
            total = grad.new_zeros(ctx.shape) if of_head is None else of_head
            total = total if total.stride(-1) == 1 else total.contiguous()
            ordered, order = torch.sort(ids.flatten(), stable=True)
            add_rows(ordered, order, rows(grad), total, ctx.padding)
            of_head = total
        return None, of_head, None
