"""Query, key and value out of the grouped ``qkv_proj`` output, queries and keys turned, in one pass.

Rows of that output are ``[Q_group | K | V]`` per KV head. RoPE (Su et al. 2021, arXiv:2104.09864) is half-split:
channel ``i`` turns with ``i + rotary_dim / 2``. Backward, the three gradients become one, in the projection's layout.
Shapes: B batch, S sequence, K key/value heads, G query heads per KV head, D head_dim, R rotary_dim.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_automodel.components.kernels.launch import jit, power_of_two, runs_on, tl, wrapped

TOKENS, WARPS = 4, 1
"""Tokens per program, of one head."""


def split_and_turn_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, group: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_and_turn` in plain operations, one rounding at the end."""
    heads = qkv.unflatten(-1, (-1, group + 2, head_dim))
    q, k, v = heads[..., :group, :].flatten(2, 3), heads[..., group, :], heads[..., group + 1, :]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    half = cos.shape[-1] // 2
    cos, sin = cos[..., None, :half].to(wide), sin[..., None, :half].to(wide)

    def turned(x: Tensor) -> Tensor:
        a, b, rest = x[..., :half].to(wide), x[..., half : 2 * half].to(wide), x[..., 2 * half :].to(wide)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1).to(qkv.dtype)

    return turned(q).transpose(1, 2), turned(k).transpose(1, 2), v.transpose(1, 2)


def split_and_turn(qkv: Tensor, cos: Tensor, sin: Tensor, group: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query ``[B, K * G, S, D]``, key and value ``[B, K, S, D]``, tokens before heads in memory.

    Args:
        qkv: ``[B, S, K * (G + 2) * D]``, on any device; a kernel runs where it can, else the reference.
        cos: ``[B or 1, S, R]``, both halves alike.
        sin: as ``cos``.
        group: G.
        head_dim: D.
    """
    if runs_on(qkv, cos, sin):
        q, k, v = _SplitAndTurn.apply(qkv, cos, sin, group, head_dim)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return split_and_turn_reference(qkv, cos, sin, group, head_dim)


@jit
def qkv_rope_kernel(  # type: ignore[no-untyped-def]
    QKV, COS, SIN, Q, K, V, tokens, sequence, table_batch_stride, table_stride, qkv_stride,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    GROUP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One head of TOKENS tokens: from QKV to Q, K or V, or, BACKWARD, the other way, turned back."""
    head = tl.program_id(1)
    kv_head, place = head // (GROUP + 2), head % (GROUP + 2)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    there = token < tokens
    batch, position = token // sequence, token % sequence
    if place < GROUP:
        part, at = Q, batch * q_batch + position * q_token + (kv_head * GROUP + place) * q_head
    elif place == GROUP:
        part, at = K, batch * k_batch + position * k_token + kv_head * k_head
    else:
        part, at = V, batch * v_batch + position * v_token + kv_head * v_head
    fused = token * qkv_stride + head * D
    half = tl.arange(0, BLOCK)
    mask = there[:, None] & (half < HALF)[None, :]
    first, second = half[None, :], half[None, :] + HALF
    if BACKWARD:
        a = tl.load(part + at[:, None] + first, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(part + at[:, None] + second, mask=mask, other=0.0).to(tl.float32)
    else:
        a = tl.load(QKV + fused[:, None] + first, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(QKV + fused[:, None] + second, mask=mask, other=0.0).to(tl.float32)
    if place <= GROUP:
        table = (batch * table_batch_stride + position * table_stride)[:, None] + half[None, :]
        cos = tl.load(COS + table, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(SIN + table, mask=mask, other=0.0).to(tl.float32)
        if BACKWARD:
            sin = -sin
        a, b = a * cos - b * sin, b * cos + a * sin
    if BACKWARD:
        tl.store(QKV + fused[:, None] + first, a.to(QKV.dtype.element_ty), mask=mask)
        tl.store(QKV + fused[:, None] + second, b.to(QKV.dtype.element_ty), mask=mask)
    else:
        tl.store(part + at[:, None] + first, a.to(QKV.dtype.element_ty), mask=mask)
        tl.store(part + at[:, None] + second, b.to(QKV.dtype.element_ty), mask=mask)
    if 2 * HALF < D:
        rest = 2 * HALF + tl.arange(0, REST)[None, :]
        mask = there[:, None] & (rest < D)
        if BACKWARD:
            kept = tl.load(part + at[:, None] + rest, mask=mask, other=0.0)
            tl.store(QKV + fused[:, None] + rest, kept, mask=mask)
        else:
            kept = tl.load(QKV + fused[:, None] + rest, mask=mask, other=0.0)
            tl.store(part + at[:, None] + rest, kept, mask=mask)


def _launch(
    qkv: Tensor, cos: Tensor, sin: Tensor, parts: tuple[Tensor, Tensor, Tensor], group: int, backward: bool
) -> None:
    batch, sequence, heads, head_dim = parts[1].shape
    if not qkv.numel():
        return
    strides = [stride for part in parts for stride in part.stride()[:3]]
    half = cos.shape[-1] // 2
    wrapped(qkv_rope_kernel)[(-(-batch * sequence // TOKENS), heads * (group + 2))](
        qkv, cos, sin, *parts, batch * sequence, sequence, 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1),
        qkv.stride(1), *strides, GROUP=group, D=head_dim, HALF=half, BACKWARD=backward, TOKENS=TOKENS,
        BLOCK=power_of_two(half), REST=power_of_two(max(1, head_dim - 2 * half)), num_warps=WARPS,
    )  # fmt: skip


@torch.library.triton_op("nemo_automodel::split_and_turn_forward", mutates_args={})
def split_and_turn_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, group: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_and_turn` as ``[B, S, heads, D]``."""
    batch, sequence, width = qkv.shape
    heads = width // ((group + 2) * head_dim)
    q = torch.empty((batch, sequence, heads * group, head_dim), dtype=qkv.dtype, device=qkv.device)
    k = torch.empty((batch, sequence, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    v = torch.empty((batch, sequence, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    _launch(qkv, cos, sin, (q, k, v), group, backward=False)
    return q, k, v


@torch.library.triton_op("nemo_automodel::split_and_turn_backward", mutates_args={})
def split_and_turn_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, group: int
) -> Tensor:
    """The gradient ``[B, S, K * (G + 2) * D]`` from those of the parts, ``[B, S, heads, D]`` in any order in memory."""
    batch, sequence, heads, head_dim = grad_k.shape
    shape = (batch, sequence, heads * (group + 2) * head_dim)
    grad = torch.empty(shape, dtype=grad_q.dtype, device=grad_q.device)
    _launch(grad, cos, sin, (grad_q, grad_k, grad_v), group, backward=True)
    return grad


class _SplitAndTurn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, group: int, head_dim: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = (table if table.stride(-1) == 1 else table.contiguous() for table in (cos, sin))
        ctx.save_for_backward(cos, sin)
        ctx.group = group
        return split_and_turn_forward(qkv.contiguous(), cos, sin, group, head_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        parts = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads]
        return split_and_turn_backward(*parts, cos, sin, ctx.group), None, None, None, None
