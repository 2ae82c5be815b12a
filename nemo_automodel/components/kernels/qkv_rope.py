"""Query, key and value out of the grouped ``qkv_proj`` output, queries and keys normed and turned, in one pass.

Rows of that output are ``[Q_group | K | V]`` per KV head. A norm of heads is RMSNorm over a head's channels (Dehghani
et al. 2023, arXiv:2302.05442, normalise queries and keys; Qwen3 with one weight for all heads). RoPE (Su et al. 2021,
arXiv:2104.09864) is half-split: channel ``i`` turns with ``i + rotary_dim / 2``. Backward, the three gradients become
one, in the projection's layout.
Shapes: B batch, S sequence, K key/value heads, G query heads per KV head, D head_dim, R rotary_dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_automodel.components.kernels.launch import fp32, jit, operator, power_of_two, runs_on, tl, wrapped

TOKENS, WARPS = 4, 1
"""Tokens per program, of one head of 128 channels or more; of narrower ones more."""

PARTIAL_SUMS = 64
"""Programs per head that add up the gradient of a norm's weight, each over its tokens."""


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorm of every query head, and of every key head, before they turn.

    Attributes:
        query: weight ``[D]``.
        key: weight ``[D]``.
        eps: added to the mean square.
        offset: added to the weights, in fp32.
    """

    query: Tensor
    key: Tensor
    eps: float
    offset: float = 0.0


def split_and_turn_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, group: int, head_dim: int, norms: HeadNorms | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_and_turn` in plain operations, one rounding at the end."""
    heads = qkv.unflatten(-1, (-1, group + 2, head_dim))
    q, k, v = heads[..., :group, :].flatten(2, 3), heads[..., group, :], heads[..., group + 1, :]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    half = cos.shape[-1] // 2
    cos, sin = cos[..., None, :half].to(wide), sin[..., None, :half].to(wide)

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.to(wide)
        if norms is not None and weight is not None:
            x = torch.nn.functional.rms_norm(x, x.shape[-1:], weight.to(wide) + norms.offset, norms.eps)
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1).to(qkv.dtype)

    q_weight, k_weight = (None, None) if norms is None else (norms.query, norms.key)
    q, k = turned(q, q_weight), turned(k, k_weight)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def split_and_turn(
    qkv: Tensor, cos: Tensor, sin: Tensor, group: int, head_dim: int, norms: HeadNorms | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query ``[B, K * G, S, D]``, key and value ``[B, K, S, D]``, tokens before heads in memory.

    Args:
        qkv: ``[B, S, K * (G + 2) * D]``, on any device; a kernel runs where it can, else the reference.
        cos: ``[B or 1, S, R]``, both halves alike.
        sin: as ``cos``.
        group: G.
        head_dim: D.
        norms: of queries and keys; None: none.
    """
    weights = (None, None) if norms is None else (norms.query, norms.key)
    if runs_on(qkv, cos, sin, *weights):
        eps, offset = (0.0, 0.0) if norms is None else (norms.eps, norms.offset)
        q, k, v = _SplitAndTurn.apply(qkv, cos, sin, group, head_dim, *weights, eps, offset)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return split_and_turn_reference(qkv, cos, sin, group, head_dim, norms)


@jit
def _load(P, row, row_mask, START: tl.constexpr, STOP: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Channels START to STOP of rows of heads, fp32 ``[TOKENS, BLOCK]``."""
    cols = START + tl.arange(0, BLOCK)
    return tl.load(P + row[:, None] + cols, mask=row_mask[:, None] & (cols < STOP), other=0.0).to(tl.float32)


@jit
def _store(P, row, row_mask, values, START: tl.constexpr, STOP: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    cols = START + tl.arange(0, BLOCK)
    tl.store(P + row[:, None] + cols, values.to(P.dtype.element_ty), mask=row_mask[:, None] & (cols < STOP))


@jit
def _weight(P, offset, START: tl.constexpr, STOP: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    cols = START + tl.arange(0, BLOCK)
    return (tl.load(P + cols, mask=cols < STOP, other=0.0).to(tl.float32) + offset)[None, :]


@jit
def qkv_rope_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915 (both ways share every address)
    QKV, RAW, COS, SIN, Q, K, V, Q_WEIGHT, K_WEIGHT, GRAD_WEIGHT,
    tokens, sequence, table_batch_stride, table_stride, qkv_stride, raw_stride,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, eps, offset,
    GROUP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr, NORM: tl.constexpr,
    WITH_WEIGHT: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Tokens of one head: from QKV to Q, K or V; BACKWARD the other way, turned back, through the norm of RAW.

    Programs take TOKENS tokens in turn; with WITH_WEIGHT each adds up its share of the norm weight's gradient.
    """
    head, eps, offset = tl.program_id(1), fp32(eps), fp32(offset)
    kv_head, place = head // (GROUP + 2), head % (GROUP + 2)
    if place < GROUP:
        part, W = Q, Q_WEIGHT
        batch_stride, token_stride = tl.cast(q_batch, tl.int64), tl.cast(q_token, tl.int64)
        at = (kv_head * GROUP + place) * tl.cast(q_head, tl.int64)
    elif place == GROUP:
        part, W = K, K_WEIGHT
        batch_stride, token_stride = tl.cast(k_batch, tl.int64), tl.cast(k_token, tl.int64)
        at = kv_head * tl.cast(k_head, tl.int64)
    else:
        part, W = V, K_WEIGHT
        batch_stride, token_stride = tl.cast(v_batch, tl.int64), tl.cast(v_token, tl.int64)
        at = kv_head * tl.cast(v_head, tl.int64)
    grad_a = tl.zeros((BLOCK,), dtype=tl.float32)
    grad_b = tl.zeros((BLOCK,), dtype=tl.float32)
    grad_c = tl.zeros((REST,), dtype=tl.float32)
    start = tl.program_id(0) * TOKENS
    while start < tokens:
        token = (start + tl.arange(0, TOKENS)).to(tl.int64)
        there = token < tokens
        batch, position = token // sequence, token % sequence
        apart = batch * batch_stride + position * token_stride + at
        fused = token * qkv_stride + head * D
        c = tl.zeros((TOKENS, REST), dtype=tl.float32)
        if BACKWARD:
            a = _load(part, apart, there, 0, HALF, BLOCK)
            b = _load(part, apart, there, HALF, 2 * HALF, BLOCK)
            if 2 * HALF < D:
                c = _load(part, apart, there, 2 * HALF, D, REST)
        else:
            a = _load(QKV, fused, there, 0, HALF, BLOCK)
            b = _load(QKV, fused, there, HALF, 2 * HALF, BLOCK)
            if 2 * HALF < D:
                c = _load(QKV, fused, there, 2 * HALF, D, REST)
        if place <= GROUP:
            if NORM and not BACKWARD:
                squares = tl.sum(a * a, 1) + tl.sum(b * b, 1) + tl.sum(c * c, 1)
                rstd = (1 / tl.sqrt(squares / D + eps))[:, None]
                a = a * rstd * _weight(W, offset, 0, HALF, BLOCK)
                b = b * rstd * _weight(W, offset, HALF, 2 * HALF, BLOCK)
                c = c * rstd * _weight(W, offset, 2 * HALF, D, REST)
            table = batch * table_batch_stride + position * table_stride
            cos = _load(COS, table, there, 0, HALF, BLOCK)
            sin = _load(SIN, table, there, 0, HALF, BLOCK)
            if BACKWARD:
                sin = -sin
            a, b = a * cos - b * sin, b * cos + a * sin
            if NORM and BACKWARD:
                raw = token * raw_stride + head * D
                x = _load(RAW, raw, there, 0, HALF, BLOCK)
                y = _load(RAW, raw, there, HALF, 2 * HALF, BLOCK)
                z = tl.zeros((TOKENS, REST), dtype=tl.float32)
                if 2 * HALF < D:
                    z = _load(RAW, raw, there, 2 * HALF, D, REST)
                squares = tl.sum(x * x, 1) + tl.sum(y * y, 1) + tl.sum(z * z, 1)
                rstd = (1 / tl.sqrt(squares / D + eps))[:, None]
                x, y, z = x * rstd, y * rstd, z * rstd
                if WITH_WEIGHT:
                    grad_a += tl.sum(a * x, 0)
                    grad_b += tl.sum(b * y, 0)
                    grad_c += tl.sum(c * z, 0)
                a = a * _weight(W, offset, 0, HALF, BLOCK)
                b = b * _weight(W, offset, HALF, 2 * HALF, BLOCK)
                c = c * _weight(W, offset, 2 * HALF, D, REST)
                mean = ((tl.sum(a * x, 1) + tl.sum(b * y, 1) + tl.sum(c * z, 1)) / D)[:, None]
                a, b, c = (a - x * mean) * rstd, (b - y * mean) * rstd, (c - z * mean) * rstd
        if BACKWARD:
            _store(QKV, fused, there, a, 0, HALF, BLOCK)
            _store(QKV, fused, there, b, HALF, 2 * HALF, BLOCK)
            if 2 * HALF < D:
                _store(QKV, fused, there, c, 2 * HALF, D, REST)
        else:
            _store(part, apart, there, a, 0, HALF, BLOCK)
            _store(part, apart, there, b, HALF, 2 * HALF, BLOCK)
            if 2 * HALF < D:
                _store(part, apart, there, c, 2 * HALF, D, REST)
        start += tl.num_programs(0) * TOKENS
    if WITH_WEIGHT:
        into = GRAD_WEIGHT + (tl.program_id(0) * tl.num_programs(1) + head) * D
        half, rest = tl.arange(0, BLOCK), 2 * HALF + tl.arange(0, REST)
        tl.store(into + half, grad_a, mask=half < HALF)
        tl.store(into + HALF + half, grad_b, mask=half < HALF)
        tl.store(into + rest, grad_c, mask=rest < D)


def _launch(
    qkv: Tensor,
    raw: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    group: int,
    norm: tuple[Tensor | None, Tensor | None, float, float],
    with_weight: bool = False,
) -> Tensor | None:
    """Forward into ``parts``, or, with ``raw``, backward from them into ``qkv``; norm weights' partial gradients."""
    batch, sequence, heads, head_dim = parts[1].shape
    q_weight, k_weight, eps, offset = norm
    taken = TOKENS * max(1, 128 // power_of_two(head_dim))
    programs = -(-batch * sequence // taken)
    partial = None
    if with_weight:
        programs = min(programs, PARTIAL_SUMS)
        partial = torch.zeros((programs, heads, group + 2, head_dim), dtype=torch.float32, device=qkv.device)
    if not qkv.numel():
        return partial
    half = cos.shape[-1] // 2
    wrapped(qkv_rope_kernel)[(programs, heads * (group + 2))](
        qkv, qkv if raw is None else raw, cos, sin, *parts, qkv if q_weight is None else q_weight,
        qkv if k_weight is None else k_weight, qkv if partial is None else partial,
        batch * sequence, sequence, 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1), qkv.stride(1),
        0 if raw is None else raw.stride(1), *(stride for part in parts for stride in part.stride()[:3]), eps, offset,
        GROUP=group, D=head_dim, HALF=half, BACKWARD=raw is not None, NORM=q_weight is not None,
        WITH_WEIGHT=with_weight, TOKENS=taken, BLOCK=power_of_two(half),
        REST=power_of_two(max(1, head_dim - 2 * half)), num_warps=WARPS,
    )  # fmt: skip
    return partial


@operator("nemo_automodel::split_and_turn_forward", mutates_args={})
def split_and_turn_forward(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    group: int,
    head_dim: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_and_turn` as ``[B, S, heads, D]``."""
    batch, sequence, width = qkv.shape
    heads = width // ((group + 2) * head_dim)
    q = torch.empty((batch, sequence, heads * group, head_dim), dtype=qkv.dtype, device=qkv.device)
    k = torch.empty((batch, sequence, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    v = torch.empty((batch, sequence, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    _launch(qkv, None, cos, sin, (q, k, v), group, (q_weight, k_weight, eps, offset))
    return q, k, v


@operator("nemo_automodel::split_and_turn_backward", mutates_args={})
def split_and_turn_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    group: int,
    qkv: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    with_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradient ``[B, S, K * (G + 2) * D]`` from those of the parts, ``[B, S, heads, D]`` however they lie.

    With norms, whose input ``qkv`` was, also the weights' gradients, fp32 ``[2, D]``; else an empty tensor.
    """
    batch, sequence, heads, head_dim = grad_k.shape
    shape = (batch, sequence, heads * (group + 2) * head_dim)
    grad = torch.empty(shape, dtype=grad_q.dtype, device=grad_q.device)
    norm = (q_weight, k_weight, eps, offset)
    parts = (grad_q, grad_k, grad_v)
    partial = _launch(grad, grad if qkv is None else qkv, cos, sin, parts, group, norm, with_weight)
    if partial is None:
        return grad, grad.new_empty(0, dtype=torch.float32)
    summed = partial.sum((0, 1))
    return grad, torch.stack((summed[:group].sum(0), summed[group]))


class _SplitAndTurn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        group: int,
        head_dim: int,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        offset: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = (table if table.stride(-1) == 1 else table.contiguous() for table in (cos, sin))
        qkv = qkv.contiguous()
        ctx.save_for_backward(cos, sin, None if q_weight is None else qkv, q_weight, k_weight)
        ctx.group, ctx.eps, ctx.offset = group, eps, offset
        return split_and_turn_forward(qkv, cos, sin, group, head_dim, q_weight, k_weight, eps, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, qkv, q_weight, k_weight = ctx.saved_tensors
        parts = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads]
        with_q, with_k = ctx.needs_input_grad[5:7]
        grad, of_weights = split_and_turn_backward(
            *parts, cos, sin, ctx.group, qkv, q_weight, k_weight, ctx.eps, ctx.offset, with_q or with_k
        )
        return (
            grad, None, None, None, None,
            of_weights[0].to(q_weight.dtype) if with_q else None,
            of_weights[1].to(k_weight.dtype) if with_k else None,
            None, None,
        )  # fmt: skip
