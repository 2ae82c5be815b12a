"""Linear layers, also frozen ones with low-rank adapters (arXiv:2106.09685), that keep little for the backward pass.

Two inputs of a decoder's projections are cheap functions of what is kept anyway: a norm's output of the residual
stream, and ``act(gate) * up`` of the fused projection's output. They are made again, instead of kept.

With adapters ``y = x W^T + t B^T``, ``t = x A^T``. One buffer ``[W | B]`` serves both ways: forward
``[x | t] [W | B]^T``, backward ``g [W | B]``, which is the input's gradient beside that of ``t``. So the adapters ride
in the layer's two products, and the wide layers' outputs are not read once more to add them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nemo_automodel.components.kernels.add_norm import add_norm_forward
from nemo_automodel.components.kernels.float8 import product, quantized, transposed, unrounded
from nemo_automodel.components.kernels.gated import (
    ACTIVATIONS,
    gated,
    gated_backward,
    gated_forward,
    gated_low_rank_backward,
    gated_low_rank_forward,
)
from nemo_automodel.components.kernels.launch import called_directly, in_fp32, rows, runs_on, untouched
from nemo_automodel.components.kernels.low_rank import add_product


@dataclass(frozen=True)
class Gated:
    """A linear layer's input ``act(gate) * up``, to be made from ``gate_up`` ``[..., 2 * width]`` when it is needed."""

    gate_up: Tensor
    activation: str

    def made(self) -> Tensor:
        """``[..., width]``, as an ordinary tensor."""
        return gated(self.gate_up, self.activation)


@dataclass(frozen=True)
class Normed:
    """How a norm's output was made; it hangs on that output itself, from `mark` to `of`."""

    MARK = "_automodel_normed"

    total: Tensor
    weight: Tensor
    rstd: Tensor
    eps: float
    offset: float
    room: int = 0
    """Columns that are free beside every row of the output."""

    def mark(self, output: Tensor) -> None:
        """Tell whoever reads ``output`` how it was made."""
        if not output.is_inference():  # which has no versions, and no backward pass
            setattr(output, self.MARK, (self, output._version))

    @classmethod
    def of(cls, x: "Tensor | Gated") -> "Normed | None":
        """How ``x`` was made; None where that is unknown, or it was changed in place since."""
        recipe, version = getattr(x, cls.MARK, (None, None))
        return recipe if isinstance(x, Tensor) and recipe is not None and version == x._version else None


class Pairs:
    """Adapters on the two halves of a gated activation's input, whose B get their gradients where that input's is made.

    The kernel that makes the gradient of gate and up has it at hand (`gated_low_rank_backward`); afterwards it would be
    read once more. It hangs on the layer's output, from `mark` to `of`, and goes back with that one gradient only.

    Args:
        of_gate: rank of the gates' adapters; 0: they have none.
        of_up: of the ups'.
    """

    MARK = "_automodel_pairs"

    def __init__(self, of_gate: int, of_up: int):
        self.of_gate, self.of_up = of_gate, of_up
        self._given: tuple[Tensor, int, Tensor] | None = None

    def mark(self, output: Tensor, t: Tensor) -> None:
        """Tell who reads ``output`` what the adapters' A gave, ``t`` ``[rows, of_gate + of_up]``."""
        setattr(output, self.MARK, (self, t))

    @classmethod
    def of(cls, source: Tensor) -> "tuple[Pairs | None, Tensor | None]":
        """The adapters behind ``source``, which autograd lets nobody change in place, and t; where there are any."""
        pairs, t = getattr(source, cls.MARK, (None, None))
        return pairs, t

    def give(self, grad: Tensor, sums: Tensor) -> None:
        """``sums`` ``[stretches, of_gate + of_up, width]`` were taken of ``grad``, the gradient of the output."""
        # held, so that autograd adds no other gradient into this memory
        self._given = (grad, grad._version, sums) if sums.numel() else None

    def take(self, grad: Tensor) -> Tensor | None:
        """B's gradients ``[2 * width, of_gate + of_up]`` from ``grad`` (elsewhere than in their own places: anything).

        None: this is not what was given, because the output had other readers or hooks, or nothing was given.
        """
        (given, version, sums), self._given = self._given or (None, None, None), None
        if given is None or sums is None or grad.data_ptr() != given.data_ptr() or grad._version != version:
            return None
        _, ranks, width = sums.shape
        of_b = sums.new_empty(width, 2, ranks)
        halves = of_b[:, 0, : self.of_gate], of_b[:, 1, self.of_gate :]
        for half, part in zip(halves, sums.split((self.of_gate, self.of_up), 1), strict=True):
            torch.sum(part, 0, out=half.t())
        return of_b.flatten(0, 1)


class LowRank(Protocol):
    """The adapters of one linear layer, as `linear` needs them; their parameters are given beside it."""

    @property
    def rank(self) -> int:
        """Of all parts together: r."""

    @property
    def joined(self) -> Tensor | None:
        """``[W | B]``, ``[out, in + r]``, of whose first columns the layer's weight is a view; None: not joined."""

    @property
    def scale(self) -> Tensor | None:
        """Of the rows of a weight in float8, fp32 ``[out, 1]``; None: the weight is in the input's dtype."""

    @property
    def pairs(self) -> tuple[int, int] | None:
        """Ranks of the adapters on gates and ups, which `pack` puts in that order; None: the layer is another."""

    writes: int
    """How often `pack` was called by a forward pass, or again before a backward pass."""

    def pack(self, parameters: Sequence[Tensor], into: Tensor) -> Tensor:
        """All A, ``[r, in]``; all B times their scales go into ``[out, r]``, in the fused rows.

        Where parts do not meet ``into`` stays as it is: zero.
        """

    def gradients(
        self, of_a: Tensor, of_b: Tensor, parameters: Sequence[Tensor], columns: Tensor | None, offset: float
    ) -> Sequence[Tensor]:
        """Of each parameter, from those of what `pack` returned and wrote.

        With ``columns`` ``[in]`` the first is yet to be multiplied by ``columns + offset``.
        """


class Linear(nn.Linear):
    """torch's, that can make its input again in the backward pass."""

    kernels = True

    def forward(self, input: "Tensor | Gated") -> Tensor:
        """``[..., in] -> [..., out]``."""
        return linear(input, self.weight, self.bias) if self.kernels else F.linear(made(input), self.weight, self.bias)


def made(x: "Tensor | Gated") -> Tensor:
    """The input as an ordinary tensor."""
    return x.made() if isinstance(x, Gated) else x


def takes_gated(module: nn.Module) -> bool:
    """Whether ``module`` can be called with `Gated`: it is `Linear` or says so, and no hook waits for a tensor."""
    return untouched(module, type(module) if getattr(type(module), "takes_gated", False) else Linear)


def linear(
    x: "Tensor | Gated",
    weight: Tensor,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """``x W^T + bias``, and the adapters' update where they are: ``[..., in] -> [..., out]``.

    Args:
        x: the input, or what it is made from.
        weight: ``[out, in]``; frozen where there are adapters.
        bias: ``[out]``.
        low_rank: the adapters; `can_run` must hold.
        parameters: theirs, in the order in which `LowRank.gradients` gives gradients.
    """
    normed = Normed.of(x)
    if low_rank is None and ((not isinstance(x, Gated) and normed is None) or not can_run(x, weight, bias)):
        return F.linear(made(x), weight, bias)
    source: Tensor = x.gate_up if isinstance(x, Gated) else x
    recipe: int | Normed | None = ACTIVATIONS[x.activation] if isinstance(x, Gated) else normed
    own = None if low_rank is None or low_rank.pairs is None else Pairs(*low_rank.pairs)
    behind, t_behind = Pairs.of(source) if isinstance(x, Gated) and low_rank is not None else (None, None)
    y, t = _Linear.apply(source, recipe, weight, bias, low_rank, own, behind, t_behind, *parameters)
    if own is not None:
        own.mark(y, t)
    return y  # type: ignore[no-any-return]


def can_run(x: "Tensor | Gated", *others: Tensor | None, anywhere: bool = False, compiled: bool = False) -> bool:
    """Whether kernels take the input and the ``others``, all of one dtype, outside autocast and compilation.

    ``anywhere``: also where no kernel runs, and the references serve. ``compiled``: also while torch.compile traces.
    """
    source = x.gate_up if isinstance(x, Gated) else x
    if (torch.compiler.is_compiling() and not compiled) or torch.is_autocast_enabled(source.device.type):
        return False
    there = [tensor for tensor in (source, *others) if tensor is not None]
    return (anywhere or runs_on(*there)) and len({tensor.dtype for tensor in there}) == 1


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        recipe: int | Normed | None,
        weight: Tensor,
        bias: Tensor | None,
        low_rank: LowRank | None,
        own: Pairs | None,
        behind: Pairs | None,
        t_behind: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        x: Tensor = rows(source)
        t: Tensor | None = None
        width = weight.shape[1]
        joined = None if low_rank is None else low_rank.joined
        room = 0 if low_rank is None or joined is None else low_rank.rank
        if isinstance(recipe, int):
            x = x.new_empty(x.shape[0], width + room)[:, :width]
            if low_rank is None:
                gated_forward(rows(source), x, recipe)
        a: Tensor | None = None
        if low_rank is None:
            y = F.linear(x, weight, bias)
        else:
            a, b = _packed(low_rank, x, weight, parameters)
            t = gated_low_rank_forward(rows(source), x, recipe, a) if isinstance(recipe, int) else x @ a.t()
            if joined is not None and (isinstance(recipe, int) or (isinstance(recipe, Normed) and recipe.room >= room)):
                # data: what is written lies beside x, which others may have kept
                whole = x.data.as_strided((x.shape[0], width + room), x.stride())
                whole[:, width:] = t
                y = F.linear(whole, joined, bias)
            else:
                y = mm_and_low_rank(x, weight, low_rank.scale, bias, t, b.t())
        normed = recipe if isinstance(recipe, Normed) else None
        # the parameters only so that autograd sees it if a step changes them before the backward pass
        ctx.save_for_backward(
            None if normed else source,
            *((normed.total.detach(), normed.weight, normed.rstd) if normed else (None, None, None)),
            weight,
            t,
            a,
            t_behind,
            *parameters,
        )
        # not the recipe itself, which would hold its tensors for as long as the loss lives
        ctx.recipe = (normed.eps, normed.offset) if normed else recipe
        ctx.low_rank, ctx.writes = low_rank, low_rank and low_rank.writes
        ctx.own, ctx.behind = own, behind
        if t is not None:
            ctx.mark_non_differentiable(t)
        ctx.set_materialize_grads(False)  # no zeros for t
        return y.view(*source.shape[:-1], weight.shape[0]), t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _t: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        source, total, norm_weight, rstd, weight, t, a, t_behind, *parameters = ctx.saved_tensors
        low_rank, recipe = ctx.low_rank, ctx.recipe
        with_source, _, with_weight, with_bias = ctx.needs_input_grad[:4]
        shape, width = (*grad.shape[:-1], weight.shape[1]), weight.shape[1]
        x = of_a = cast("Any", None)
        of_b = ctx.own and ctx.own.take(grad)
        grad = rows(grad)
        flat = rows(total if source is None else source)
        grad_x, grad_t = _gradients(ctx, grad, weight, parameters)
        if isinstance(recipe, int):
            shape = *shape[:-1], 2 * width
            if low_rank is not None and with_source:  # one kernel adds the adapters' part, and makes x as it passes
                grad_x, of_a = _through_gate(grad_x, flat, recipe, grad_t, a, ctx.behind, t_behind)
            else:
                x = flat.new_empty(flat.shape[0], width) if with_weight or low_rank is not None else None
                if grad_x is not None:
                    grad_x = gated_backward(grad_x, flat, x, recipe)
                elif x is not None:
                    gated_forward(flat, x, recipe)
                of_a = None if grad_t is None else grad_t.t() @ x
        else:
            if grad_t is not None and with_source:
                add_product(grad_x, grad_t, a, grad_x)
            if isinstance(recipe, tuple) and with_weight:
                x = torch.empty_like(flat)
                add_norm_forward(flat, None, norm_weight, None, x, None, *recipe)
            elif recipe is None:
                x = flat

        adapters: Sequence[Tensor] = ()
        if low_rank is not None:
            columns, offset = None, 0.0
            if isinstance(recipe, tuple):  # (total * rstd * weight)^T grad_t, without making the norm again
                of_a = in_fp32(torch.mul(grad_t, rstd[:, None], out=torch.empty_like(grad_t)).t(), flat)
                columns, offset = norm_weight, recipe[1]
            elif recipe is None:
                of_a = grad_t.t() @ x
            of_b = grad.t() @ t if of_b is None else of_b
            adapters = low_rank.gradients(of_a, of_b, parameters, columns, offset)
        return (
            grad_x.view(shape) if with_source else None,
            None,
            grad.t() @ x if with_weight else None,
            grad.sum(0) if with_bias else None,
            *(None,) * 4,
            *adapters,
        )


def _through_gate(
    grad: Tensor, gate_up: Tensor, activation: int, grad_t: Tensor, a: Tensor, behind: Pairs | None, t: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of ``gate_up`` and of the layer's A; those of the B ``behind`` go there."""
    if behind is None:
        return gated_low_rank_backward(grad, gate_up, activation, grad_t, a)[:2]
    grad_gate_up, of_a, sums = gated_low_rank_backward(
        grad, gate_up, activation, grad_t, a, t, behind.of_gate, behind.of_up
    )
    behind.give(grad_gate_up, sums)
    return grad_gate_up, of_a


BLOCK = 8192
"""Rows whose products are in fp32 at a time."""


def _mm_and_low_rank(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, left: Tensor, right: Tensor
) -> Tensor:
    """``x W^T + bias + left @ right``, rounded once.

    Added to a rounded product, what adapters learn at first would be lost, which is below half of its last bit. (So
    does torch's ``addmm`` on a GPU; float8's products come rounded where `unrounded` says so.)

    Args:
        x: ``[rows, in]``, in fp32 or half precision as all others are.
        weight: ``[out, in]``.
        scale: of a weight in float8, as `LowRank` has it, which has no gradient here; None: it is like ``x``.
        bias: ``[out]``.
        left: ``[rows, r]``.
        right: ``[r, out]``.
    """
    out = x.new_empty(x.shape[0], weight.shape[0])
    for at in range(0, len(x), BLOCK):
        some = x[at : at + BLOCK]
        y = in_fp32(some, weight.t()) if scale is None else product(*quantized(some), weight, scale, unrounded(x))
        add_product(y, left[at : at + BLOCK], right, out[at : at + BLOCK], bias)
    return out


# named as products are, for selective checkpointing to keep; made by a kernel of ours, it would be computed again
_SUM = torch.library.custom_op("nemo_automodel::mm_and_low_rank", _mm_and_low_rank, mutates_args=())


@_SUM.register_fake
def _(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _, left, right = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, left, right)


def _through_sum(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, left, right = ctx.saved_tensors
    of_x, of_weight, _, of_bias, of_left, of_right = ctx.needs_input_grad
    return (
        grad @ weight if of_x else None,
        grad.t() @ x if of_weight else None,
        None,
        grad.sum(0) if of_bias else None,
        grad @ right.t() if of_left else None,
        left.t() @ grad if of_right else None,
    )


_SUM.register_autograd(_through_sum, setup_context=_keep)
mm_and_low_rank = called_directly(_SUM, _mm_and_low_rank)


def _base_gradient(grad: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """``grad W``."""
    if scale is None:
        return grad @ weight
    return product(*quantized(grad, scale.squeeze(1)), transposed(weight), None, grad.dtype)


def _gradients(ctx: Any, grad: Tensor, weight: Tensor, parameters: Sequence[Tensor]) -> tuple[Any, Any]:
    """``grad W``, and the gradient of ``t``: each where it is needed, by one product, with rows apart, where it can."""
    low_rank, width, with_source = ctx.low_rank, weight.shape[1], ctx.needs_input_grad[0]
    if low_rank is None:
        return grad @ weight if with_source else None, None
    if low_rank.writes != ctx.writes or low_rank.joined is None:  # another forward pass wrote other adapters
        _, b = _packed(low_rank, grad, weight, parameters)
    else:
        b = low_rank.joined[:, width:]
    if not with_source:  # the first layer, of frozen embeddings
        return None, grad @ b
    # not where x is no recipe: its gradient, whose rows lie apart, would go elsewhere than to our own kernels
    if low_rank.joined is None or ctx.recipe is None:
        return _base_gradient(grad, weight, low_rank.scale), grad @ b
    both = grad @ low_rank.joined
    return both[:, :width], both[:, width:]


def _packed(low_rank: LowRank, like: Tensor, weight: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All A ``[r, in]``, and all B ``[out, r]``: beside the weight where the two are joined, else by themselves."""
    if low_rank.joined is None:
        b = like.new_zeros(weight.shape[0], low_rank.rank)
    else:
        b = low_rank.joined[:, weight.shape[1] :]
    a = low_rank.pack(parameters, b)
    low_rank.writes += 1
    return a, b
