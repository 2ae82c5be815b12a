"""Causal attention to a sequence that ranks share, its keys and values going round (ring attention, arXiv:2310.01889).

The rounds, the merging of what they give and which piece sees which are torch's own, as its `context_parallel` runs
them. That function replaces ``F.scaled_dot_product_attention`` for the whole process and has kernels for GPUs only; the
same rounds are run here by an autograd function, over the kernel of the device at hand.
Shapes: B batch, s this rank's part of the sequence, H query heads, K key/value heads, D head_dim.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.experimental._attention import _templated_ring_attention
from torch.distributed.tensor.experimental._context_parallel._attention import _templated_ring_attention_backward

aten = torch.ops.aten


def ring_gap(query: Tensor) -> str | None:
    """What the kernels lack for such a query ``[B, H, s, D]``, in words; None: nothing."""
    if query.device.type == "cpu":
        return None
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"kernel for {str(query.dtype).removeprefix('torch.')} on {query.device.type}"
    return None if query.shape[-1] % 8 == 0 else f"head_dim of {query.shape[-1]}, only multiples of 8"


def ring_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None, group: dist.ProcessGroup) -> Tensor:
    """Causal attention, ``[B, H, s, D]``, of this rank's pieces of the sequence to all of it.

    Args:
        query: ``[B, H, s, D]``, two pieces: of ``2 n`` for ``n`` ranks, rank ``r`` has the pieces ``r`` and
            ``2 n - 1 - r``.
        key: ``[B, K, s, D]``.
        value: ``[B, K, s, D]``.
        scale: factor on the scores; None: ``D ** -0.5``.
        group: the ranks.
    """
    output: Tensor = _RingAttention.apply(query, key, value, scale, group)  # type: ignore[no-untyped-call]
    return output


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None, group: dist.ProcessGroup
    ) -> Tensor:
        attend: Any = _attend
        output, logsumexp, *ctx.random = _templated_ring_attention(
            group, 2, attend, query, key, value, is_causal=True, scale=scale
        )
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.scale, ctx.group = scale, group
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradients_of: Any = _gradients
        query, key, value, output, logsumexp = ctx.saved_tensors
        found = _templated_ring_attention_backward(
            ctx.group,
            2,
            gradients_of,
            gradients[0].contiguous(),
            "gradient",
            query,
            key,
            value,
            output,
            logsumexp,
            is_causal=True,
            scale=ctx.scale,
            random=ctx.random,
        )
        return *found[:3], None, None


def _attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> tuple[Any, ...]:
    """Output, logsumexp, and the state of dropout, that there is none of, for the kernel's gradient."""
    key, value = _for_each_query(key, query), _for_each_query(value, query)
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)
    found = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)
    return found[0], found[1], found[6], found[7]


def _gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float | None,
    random: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    given = gradient, query, _for_each_query(key, query), _for_each_query(value, query), out, logsumexp
    if query.device.type == "cpu":
        of_query, *others = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *given, 0.0, is_causal, scale=scale
        )
    else:
        of_query, *others = aten._scaled_dot_product_flash_attention_backward(
            *given, None, None, query.shape[2], key.shape[2], 0.0, is_causal, *random, scale=scale
        )
    of_key, of_value = (x.unflatten(1, (key.shape[1], -1)).sum(2) for x in others)
    return of_query, of_key, of_value


def _for_each_query(heads: Tensor, query: Tensor) -> Tensor:
    """``[B, H, s, D]`` of ``[B, K, s, D]``; here, and not before, so that what goes round stays small."""
    return heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1)
