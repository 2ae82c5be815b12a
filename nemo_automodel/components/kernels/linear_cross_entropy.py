"""Cross entropy of a linear head without the full logits.

The rows of the hidden states go through the head a chunk at a time. A chunk's logits become their own gradient in
place, which gives the gradients of hidden states and head at once; nothing of rows x vocabulary outlives its chunk.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_automodel.components.kernels.launch import fp32, in_fp32, jit, operator, runs_on, tl, wrapped

IGNORE = -100
"""Label of a token that is not to be predicted."""

CHUNK, CHUNK_TRAINED = 2**28, 2**30
"""Logits of one chunk, at most; more where the head is trained, for its gradient is read and written for each."""
BLOCK, WARPS = 8192, 16
WARPS_TWICE = 32
"""Of the kernel that reads a row twice: one program a processor, so that all of their rows stay in the cache."""


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, multiplier: float = 1.0, softcap: float | None = None
) -> Tensor:
    """`linear_cross_entropy` in plain operations, on all logits at once."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if multiplier == 1.0 else logits * multiplier
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    multiplier: float = 1.0,
    softcap: float | None = None,
    group: dist.ProcessGroup | None = None,
    vocabulary: int | None = None,
) -> Tensor:
    """Sum over rows of ``logsumexp(logits) - logits[target]``, fp32, with ``logits = multiplier * hidden @ weight.T``.

    Args:
        hidden: ``[rows, n]``, on any device; kernels run where they can, else the reference.
        weight: ``[vocabulary, n]``; with ``group`` this rank's part of the vocabulary.
        targets: ``[rows]`` int64, `IGNORE` where there is nothing to predict; any other number outside of the
            vocabulary makes the loss NaN.
        multiplier: factor on the logits.
        softcap: logits then become ``softcap * tanh(logits / softcap)``.
        group: ranks that hold parts of the vocabulary, in their order; the hidden states' gradient is this rank's term
            of their sum. All parts but the last ones are equal, as torch's ``chunk`` cuts.
        vocabulary: tokens in it; default: what equal parts make.

    Raises:
        ValueError: not a target for each row.
    """
    if len(targets) != len(hidden):
        raise ValueError(f"{len(targets)} targets for {len(hidden)} rows")
    kernels = runs_on(hidden, weight) and not torch.is_autocast_enabled(hidden.device.type)
    first, whole = _place(len(weight), group, vocabulary)
    if kernels and hidden.dtype == weight.dtype and len(weight):
        return _LinearCrossEntropy.apply(
            hidden, weight, targets, multiplier, softcap or 0.0, group, first, whole, torch.is_grad_enabled()
        )
    if group is not None:
        return _reference_in_parts(hidden, weight, targets, multiplier, softcap, group, first, whole)
    return linear_cross_entropy_reference(hidden, weight, targets, multiplier, softcap)


def _place(own: int, group: dist.ProcessGroup | None, vocabulary: int | None) -> tuple[int, int]:
    """The first token of this rank's part, and how many there are in all."""
    if group is None:
        return 0, own
    ranks = dist.get_world_size(group)
    whole = own * ranks if vocabulary is None else vocabulary
    return min(whole, dist.get_rank(group) * -(-whole // ranks)), whole


def _reference_in_parts(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    multiplier: float,
    softcap: float | None,
    group: dist.ProcessGroup,
    first: int,
    whole: int,
) -> Tensor:
    """As `linear_cross_entropy_reference`, of ranks with parts of the vocabulary."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * multiplier
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lowest = logits.new_full((len(logits), 1), -torch.inf)  # a rank may have no token at all
    highest = torch.cat((logits.detach(), lowest), dim=1).amax(dim=1)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    here = (targets >= first) & (targets < first + len(weight))
    at_target = torch.cat((logits, lowest), dim=1).gather(1, torch.where(here, targets - first, 0)[:, None])[:, 0]
    terms = torch.stack((torch.exp(logits - highest[:, None]).sum(dim=1), at_target.where(here, 0.0)))
    total, at_target = _AddUp.apply(terms, group)
    at_target = at_target.where((targets >= 0) & (targets < whole), torch.nan)
    return torch.where(targets != IGNORE, highest + torch.log(total) - at_target, 0.0).sum()


class _AddUp(torch.autograd.Function):
    """The ranks' sum; all of them compute the same from it, so its gradient is that of each term."""

    @staticmethod
    def forward(ctx: Any, terms: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = terms.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@jit
def _capped(logits, multiplier, softcap, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    logits = logits.to(tl.float32) * multiplier
    if CAP:
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
    return logits


@jit
def _sum_of_exponentials(  # type: ignore[no-untyped-def]
    ROW, multiplier, softcap, V: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr
):
    """A row's highest logit, and the sum of exponentials less it."""
    highest = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        # to be read again soon, where the gradient follows
        logits = tl.load(ROW + cols, mask=cols < V, other=0.0, eviction_policy="evict_last")
        logits = tl.where(cols < V, _capped(logits, multiplier, softcap, CAP), -float("inf"))
        # one of the two is as it is, the other less by this; not a number where a logit is none
        less = tl.exp(-tl.abs(logits - highest))
        # a lane that has seen nothing yet is -inf, as is a masked one
        less = tl.where((logits == -float("inf")) & (highest == -float("inf")), 0.0, less)
        total = tl.where(logits > highest, total * less + 1.0, total + less)
        highest = tl.maximum(highest, logits)
    maximum = tl.max(highest, 0)
    seen = (highest > -float("inf")) | (total != total)
    return maximum, tl.sum(tl.where(seen, total * tl.exp(highest - maximum), 0.0), 0)


@jit
def _logit_at(  # type: ignore[no-untyped-def]
    ROW, target, first, whole, multiplier, softcap, V: tl.constexpr, CAP: tl.constexpr
):
    """The target's logit; 0 where it is in another part of the vocabulary, NaN where it is in none."""
    elsewhere = tl.where((target >= 0) & (target < whole), 0.0, float("nan"))
    here = (target >= first) & (target < first + V)
    at_target = tl.load(ROW + tl.where(here, target - first, 0))
    return tl.where(here, _capped(at_target, multiplier, softcap, CAP), elsewhere)


@jit
def _to_gradient(  # type: ignore[no-untyped-def]
    ROW, target, lse, counted, multiplier, softcap, V: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr
):
    """A row of logits becomes its gradient; ``target`` counts from the row's first."""
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        logits = tl.load(ROW + cols, mask=cols < V, other=0.0, eviction_policy="evict_first")
        logits = _capped(logits, multiplier, softcap, CAP)
        grad = tl.exp(logits - lse) - tl.where(cols == target, 1.0, 0.0)
        if CAP:
            grad *= 1 - (logits / softcap) * (logits / softcap)
        grad = tl.where(counted, grad * multiplier, 0.0)
        tl.store(ROW + cols, grad.to(ROW.dtype.element_ty), mask=cols < V)


@jit
def cross_entropy_statistics_kernel(  # type: ignore[no-untyped-def]
    LOGITS, TARGETS, MAXIMUM, SUM, AT_TARGET, stride, first, whole, multiplier, softcap,
    V: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, multiplier, softcap = tl.program_id(0).to(tl.int64), fp32(multiplier), fp32(softcap)
    ROW, target = LOGITS + row * stride, tl.load(TARGETS + row)
    maximum, total = _sum_of_exponentials(ROW, multiplier, softcap, V, CAP, BLOCK)
    tl.store(MAXIMUM + row, maximum)
    tl.store(SUM + row, total)
    tl.store(AT_TARGET + row, _logit_at(ROW, target, first, whole, multiplier, softcap, V, CAP))


@jit
def cross_entropy_gradient_kernel(  # type: ignore[no-untyped-def]
    LOGITS, TARGETS, LSE, stride, first, multiplier, softcap,
    V: tl.constexpr, CAP: tl.constexpr, IGNORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, multiplier, softcap = tl.program_id(0).to(tl.int64), fp32(multiplier), fp32(softcap)
    target = tl.load(TARGETS + row)
    lse, counted = tl.load(LSE + row), target != IGNORE
    _to_gradient(LOGITS + row * stride, target - first, lse, counted, multiplier, softcap, V, CAP, BLOCK)


@jit
def cross_entropy_kernel(  # type: ignore[no-untyped-def]
    LOGITS, TARGETS, LOSS, stride, multiplier, softcap,
    V: tl.constexpr, CAP: tl.constexpr, IGNORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both of the above on a whole vocabulary: a row is still in the cache when it is read again."""
    row, multiplier, softcap = tl.program_id(0).to(tl.int64), fp32(multiplier), fp32(softcap)
    ROW, target = LOGITS + row * stride, tl.load(TARGETS + row)
    counted = target != IGNORE
    at_target = _logit_at(ROW, target, 0, V, multiplier, softcap, V, CAP)
    maximum, total = _sum_of_exponentials(ROW, multiplier, softcap, V, CAP, BLOCK)
    lse = maximum + tl.log(total)
    tl.store(LOSS + row, tl.where(counted, lse - at_target, 0.0))
    tl.debug_barrier()  # no thread may write before all have read the target's logit
    _to_gradient(ROW, target, lse, counted, multiplier, softcap, V, CAP, BLOCK)


@jit
def scaled_kernel(X, FACTOR, OUT, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(OUT + at, (x * tl.load(FACTOR)).to(OUT.dtype.element_ty), mask=at < n)


@operator("nemo_automodel::cross_entropy_statistics", mutates_args={})
def cross_entropy_statistics(
    logits: Tensor, targets: Tensor, first: int, whole: int, multiplier: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row: the highest logit, the sum of exponentials less it, the target's logit.

    That is 0 where the target is in another part of the ``whole`` vocabulary, NaN where it is in none.
    """
    count, vocabulary = logits.shape
    maximum = torch.empty(count, dtype=torch.float32, device=logits.device)
    total, at_target = torch.empty_like(maximum), torch.empty_like(maximum)
    wrapped(cross_entropy_statistics_kernel)[(count,)](
        logits, targets, maximum, total, at_target, logits.stride(0), first, whole, multiplier, softcap,
        V=vocabulary, CAP=softcap > 0, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return maximum, total, at_target


@operator("nemo_automodel::cross_entropy_gradient", mutates_args={"logits"})
def cross_entropy_gradient(
    logits: Tensor, targets: Tensor, lse: Tensor, first: int, multiplier: float, softcap: float
) -> None:
    """Logits become the gradient of the loss with respect to what the head's product gave."""
    wrapped(cross_entropy_gradient_kernel)[(logits.shape[0],)](
        logits, targets, lse, logits.stride(0), first, multiplier, softcap,
        V=logits.shape[1], CAP=softcap > 0, IGNORE=IGNORE, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


@operator("nemo_automodel::cross_entropy", mutates_args={"logits"})
def cross_entropy(logits: Tensor, targets: Tensor, multiplier: float, softcap: float) -> Tensor:
    """Loss of each row, fp32; logits become the gradient, as by `cross_entropy_gradient`. Of a whole vocabulary."""
    loss = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    wrapped(cross_entropy_kernel)[(logits.shape[0],)](
        logits, targets, loss, logits.stride(0), multiplier, softcap,
        V=logits.shape[1], CAP=softcap > 0, IGNORE=IGNORE, BLOCK=BLOCK, num_warps=WARPS_TWICE,
    )  # fmt: skip
    return loss


@operator("nemo_automodel::scaled", mutates_args={})
def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous ``x`` times an fp32 scalar, rounded once; torch would round the factor to ``x``'s dtype first."""
    out = torch.empty_like(x, dtype=dtype)
    if x.numel():
        wrapped(scaled_kernel)[(-(-x.numel() // BLOCK),)](x, factor, out, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        multiplier: float,
        softcap: float,
        group: dist.ProcessGroup | None,
        first: int,
        whole: int,
        with_grad: bool,
    ) -> Tensor:
        with_hidden, with_weight = (needed and with_grad for needed in ctx.needs_input_grad[:2])
        rows_at_once = max(128, (CHUNK_TRAINED if with_weight else CHUNK) // weight.shape[0] // 128 * 128)
        chunks = hidden.split(rows_at_once)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_hidden else None
        grad_weight = _Sum(weight, len(chunks) if len(hidden) else 0) if with_weight else None
        # one piece of memory for all: a chunk's own would be there while the last one's still is
        room, done = hidden.new_empty(len(chunks[0]), weight.shape[0]), 0
        for chunk, wanted in zip(chunks, targets.split(rows_at_once), strict=True):
            if not len(chunk):
                continue
            logits = torch.mm(chunk, weight.t(), out=room[: len(chunk)])
            if group is None and (with_hidden or with_weight):
                loss += cross_entropy(logits, wanted, multiplier, softcap).sum()
            else:
                statistics = cross_entropy_statistics(logits, wanted, first, whole, multiplier, softcap)
                lse, at_target = _log_sum_exp(group, *statistics)
                loss += torch.where(wanted != IGNORE, lse - at_target, 0.0).sum()
                if with_hidden or with_weight:
                    cross_entropy_gradient(logits, wanted, lse, first, multiplier, softcap)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[done : done + len(chunk)])
            if grad_weight is not None:
                grad_weight.add(logits.t(), chunk)
            done += len(chunk)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.total)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grads = [None if x is None else scaled(x, grad, ctx.dtype) for x in (grad_hidden, grad_weight)]
        return *grads, None, None, None, None, None, None, None


def _log_sum_exp(
    group: dist.ProcessGroup | None, maximum: Tensor, total: Tensor, at_target: Tensor
) -> tuple[Tensor, Tensor]:
    """Over the whole vocabulary, and the target's logit, from the parts of ``group``'s ranks."""
    if group is not None:
        highest = maximum.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        parts = torch.stack((total * torch.exp(maximum - highest), at_target))
        dist.all_reduce(parts, group=group)
        maximum, (total, at_target) = highest, parts
    return maximum + torch.log(total), at_target


class _Sum:
    """A weight's gradient, added up in fp32 over chunks (or none); a single one does so inside its product."""

    def __init__(self, weight: Tensor, chunks: int):
        self.chunks, self.added = chunks, 0
        self.total = weight.new_empty(0) if chunks else torch.zeros_like(weight)

    def add(self, a: Tensor, b: Tensor) -> None:
        if self.chunks == 1:
            self.total = a @ b
        elif not self.added:
            self.total = in_fp32(a, b)
        elif a.is_cuda and a.dtype != torch.float32:
            torch.addmm(self.total, a, b, out_dtype=torch.float32, out=self.total)
        else:
            self.total += in_fp32(a, b)
        self.added += 1
