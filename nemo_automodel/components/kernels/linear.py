"""Linear layers, frozen ones with low-rank adapters (arXiv:2106.09685) too, that keep as little as they can for backward.

Two inputs of a decoder's projections are cheap functions of what is kept anyway: a norm's output of the residual stream,
and ``act(gate) * up`` of the fused projection's output. They are made again, instead of kept.

With adapters ``y = x W^T + t B^T``, ``t = x A^T``. One buffer ``[W | B]`` serves both ways: forward ``[x | t] [W | B]^T``,
backward ``g [W | B]``, which is the input's gradient beside that of ``t``. So the adapters ride in the layer's two
products, and neither output nor input gradient of the wide layers is read once more to add them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nemo_automodel.components.kernels.add_norm import add_norm_forward
from nemo_automodel.components.kernels.gated import ACTIVATIONS, gated, gated_backward, gated_forward
from nemo_automodel.components.kernels.launch import rows, runs_on


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
    """How a norm's output was made; it hangs on that output as its attribute `Normed.MARK`."""

    MARK = "_automodel_normed"

    total: Tensor
    weight: Tensor
    eps: float
    offset: float


class LowRank(Protocol):
    """The adapters of one linear layer, as `linear` needs them; their parameters are given beside it."""

    @property
    def rank(self) -> int:
        """Of all parts together: r."""

    @property
    def joined(self) -> Tensor | None:
        """``[W | B]``, ``[out, in + r]``, of whose first columns the layer's weight is a view; None: not joined."""

    def stacked(self, parameters: Sequence[Tensor]) -> Tensor:
        """All A, ``[r, in]``."""

    def write(self, parameters: Sequence[Tensor], into: Tensor) -> None:
        """All B times their scales, in the fused rows, into ``[out, r]``, which is zero where nothing was ever written."""

    def gradients(self, of_a: Tensor, of_b: Tensor) -> Sequence[Tensor]:
        """Of each parameter, from those of ``stacked`` and of what ``write`` wrote."""


class Linear(nn.Linear):
    """torch's, that can make its input again in the backward pass."""

    def forward(self, input: "Tensor | Gated") -> Tensor:
        """``[..., in] -> [..., out]``."""
        return linear(input, self.weight, self.bias)


def takes_gated(module: nn.Module) -> bool:
    """Whether ``module`` can be called with `Gated`: it is `Linear` or says so, and no hook waits for a tensor."""
    if not (isinstance(module, Linear) or getattr(module, "takes_gated", False)):
        return False
    return not (module._forward_pre_hooks or module._forward_hooks)


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
    normed = getattr(x, Normed.MARK, None)
    if low_rank is None and ((not isinstance(x, Gated) and normed is None) or not can_run(x, weight, bias)):
        return F.linear(x.made() if isinstance(x, Gated) else x, weight, bias)
    if isinstance(x, Gated):
        source, recipe = x.gate_up, ACTIVATIONS[x.activation]
    else:
        source, recipe = x, normed
    return _Linear.apply(source, recipe, weight, bias, low_rank, *parameters)


def can_run(x: "Tensor | Gated", *others: Tensor | None) -> bool:
    """Whether kernels take the input and the ``others``, all of one dtype, outside autocast and compilation."""
    source = x.gate_up if isinstance(x, Gated) else x
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(source.device.type):
        return False
    there = [tensor for tensor in (source, *others) if tensor is not None]
    return runs_on(*there) and len({tensor.dtype for tensor in there}) == 1


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        recipe: int | Normed | None,
        weight: Tensor,
        bias: Tensor | None,
        low_rank: LowRank | None,
        *parameters: Tensor,
    ) -> Tensor:
        out_features, width = weight.shape
        joined = None if low_rank is None else low_rank.joined
        # room for t beside x, so that the two are one operand
        x = _input(source, recipe, width, 0 if joined is None or low_rank is None else low_rank.rank)
        t = b = None
        if low_rank is None:
            y = F.linear(x, weight, bias)
        elif joined is not None:
            low_rank.write(parameters, joined[:, width:])
            whole = x.as_strided((x.shape[0], width + low_rank.rank), x.stride())
            torch.mm(x, low_rank.stacked(parameters).t(), out=whole[:, width:])
            t = whole[:, width:].contiguous()
            y = F.linear(whole, joined, bias)
        else:
            b = weight.new_zeros(out_features, low_rank.rank)
            low_rank.write(parameters, b)
            t = x @ low_rank.stacked(parameters).t()
            y = F.linear(x, weight, bias).addmm_(t, b.t())
        # B's own parameters are kept beside [W | B] so that autograd sees if a step changes them before the backward
        normed = (recipe.total.detach(), recipe.weight) if isinstance(recipe, Normed) else (None, None)
        kept = None if isinstance(recipe, Normed) else source
        ctx.save_for_backward(kept, *normed, weight, t, b, *parameters)
        # not the recipe itself, which would hold its tensors for as long as the loss lives
        ctx.recipe = (recipe.eps, recipe.offset) if isinstance(recipe, Normed) else recipe
        ctx.low_rank = low_rank
        ctx.with_bias = bias is not None
        return y.view(*source.shape[:-1], out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source, total, norm_weight, weight, t, b, *parameters = ctx.saved_tensors
        low_rank, recipe = ctx.low_rank, ctx.recipe
        with_source, _, with_weight, with_bias = ctx.needs_input_grad[:4]
        if isinstance(recipe, tuple):
            source, recipe = total, Normed(total, norm_weight, *recipe)
        width = weight.shape[1]
        grad = rows(grad)
        a = grad_x = grad_t = grad_a = grad_b = None
        if low_rank is not None:
            a = low_rank.stacked(parameters)
            if low_rank.joined is not None:
                both = grad @ low_rank.joined
                grad_x, grad_t = both[:, :width], both[:, width:].contiguous()
            else:
                grad_x, grad_t = grad @ weight, grad @ b
            grad_x.addmm_(grad_t, a)
            grad_b = grad.t() @ t
        elif with_source:
            grad_x = grad @ weight
        with_input = with_weight or low_rank is not None
        if isinstance(recipe, int):
            flat = rows(source)
            x = flat.new_empty(flat.shape[0], width) if with_input else None
            grad_source = gated_backward(grad_x, flat, x, recipe) if with_source else None
            if x is not None and grad_source is None:
                gated_forward(flat, x, recipe)
        else:
            x = _input(source, recipe, width, 0) if with_input else None
            grad_source = grad_x
        grad_weight = grad.t() @ x if with_weight else None
        grad_bias = grad.sum(0) if ctx.with_bias and with_bias else None
        if grad_source is not None:
            grad_source = grad_source.view(source.shape)
        adapters: Sequence[Tensor] = ()
        if low_rank is not None:
            grad_a = grad_t.t() @ x
            adapters = low_rank.gradients(grad_a, grad_b)
        return grad_source, None, grad_weight, grad_bias, None, *adapters


def _input(source: Tensor, recipe: int | Normed | None, width: int, room: int) -> Tensor:
    """The layer's input ``[rows, width]``, made as ``recipe`` says, with ``room`` for more columns beside every row."""
    flat = rows(source)
    if isinstance(recipe, int):
        x = flat.new_empty(flat.shape[0], width + room)[:, :width]
        gated_forward(flat, x, recipe)
        return x
    # forward the norm's output is there; backward it is made again
    if isinstance(recipe, Normed) and source is recipe.total:
        x = flat.new_empty(flat.shape[0], width + room)[:, :width]
        add_norm_forward(flat, None, recipe.weight, None, x, None, recipe.eps, recipe.offset)
        return x
    if not room:
        return flat
    x = flat.new_empty(flat.shape[0], width + room)[:, :width]
    x.copy_(flat)
    return x
