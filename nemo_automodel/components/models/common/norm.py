"""Norms: root mean square (Zhang & Sennrich 2019, arXiv:1910.07467, equation 4) and layer normalisation.

Statistics are in fp32 and the output is in the input's dtype, whatever the weight's is.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_automodel.components.kernels.add_norm import WIDEST, add_norm
from nemo_automodel.components.kernels.launch import runs_on
from nemo_automodel.components.kernels.linear import Normed

NARROW = 512
"""Rows of fewer channels (a head's) are left to torch, whose kernel takes many of them at once."""


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """What kind of norm a family has.

    Attributes:
        kind: root mean square, or layer normalisation, which takes the mean off first.
        bias: whether one is added (layer normalisation only).
        offset: added to the weight: 1 where checkpoints hold the difference from one.
        fp32: multiply by the weight in fp32 and round once; otherwise the weight is rounded to the input's dtype first.
        initial: what the weight starts at.

    Raises:
        ValueError: a kind that there is not, or a root mean square with a bias.
    """

    kind: Literal["rms", "layer"] = "rms"
    bias: bool = False
    offset: float = 0.0
    fp32: bool = False
    initial: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("rms", "layer"):
            raise ValueError(f"norm.kind={self.kind!r} is not one of 'rms', 'layer'")
        if self.bias and self.kind == "rms":
            raise ValueError("norm.bias=True: only a layer norm has a bias")


class _Norm(nn.Module):
    """What both share: a weight, the number added to it, and where it is rounded."""

    def __init__(
        self,
        dim: int | tuple[int, ...],
        eps: float = 1e-5,
        fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = False,
        offset: float = 0.0,
        initial: float = 1.0,
    ):
        super().__init__()
        shape = (dim,) if isinstance(dim, int) else dim
        self.weight = nn.Parameter(torch.full(shape, initial, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros_like(self.weight)) if bias else None
        self.eps = eps
        self.fp32 = fp32
        self.offset = offset
        self.initial = initial

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise over the last dimension of ``[..., *dim]``."""
        dtype = torch.float32 if self.fp32 else hidden_states.dtype
        weight = self.weight.to(dtype) if self.fp32 else self.weight
        weight = (weight + self.offset if self.offset else weight).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if weight.ndim == 1:
            normed = self._normed(hidden_states.to(dtype), weight, bias)
        else:  # a weight for each head, where torch would take heads and channels for one norm
            normed = self._normed(hidden_states.to(dtype), None, None) * weight + (0 if bias is None else bias)
        return normed.to(hidden_states.dtype)

    def _normed(self, hidden_states: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        shape = ", ".join(map(str, self.weight.shape))
        return f"{shape}, eps={self.eps}, fp32={self.fp32}" + f", offset={self.offset}" * bool(self.offset)


class RMSNorm(_Norm):
    """``x / sqrt(mean(x^2) + eps) * (weight + offset)`` over the last dimension.

    On a GPU, rows of a model's width go through a kernel that adds the residual stream too (`with_residual`).

    Args:
        dim: shape of the weight: the size of the last dimension, or of the last two (a weight for each head).
        eps: added to the mean square.
        fp32: upcast input and weight, so that a weight kept in higher precision than ``x`` is not rounded first.
        device: where the weight lives.
        dtype: the weight's dtype.
        bias: whether to add one, of the weight's shape; a `LayerNorm` only.
        offset: added to the weight.
        initial: what the weight starts at.
    """

    kernels = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.with_residual(hidden_states)[1] if self.fuses(hidden_states) else super().forward(hidden_states)

    def with_residual(
        self, residual: Tensor, branch: Tensor | None = None, reader: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(residual + branch, norm(residual + branch))`` by the kernel, where it `fuses`.

        ``reader``, the linear layer that reads the norm, gets the room beside the rows that it wants (`LowRank`).
        """
        room = getattr(reader, "room", 0)
        total, normed, rstd = add_norm(residual, branch, self.weight, self.eps, self.offset, room)
        assert rstd is not None
        if reader is None:
            return total, normed
        # a linear layer that reads it need not keep it
        Normed(total, self.weight, rstd, self.eps, self.offset, room).mark(normed)
        return total, normed

    def fuses(self, hidden_states: Tensor) -> bool:
        """Whether `with_residual` computes this norm on ``hidden_states``."""
        return NARROW <= hidden_states.shape[-1] <= WIDEST and self.in_kernels(hidden_states)

    def in_kernels(self, hidden_states: Tensor) -> bool:
        """Whether kernels, which multiply by the weight in fp32, compute what the fields say on ``hidden_states``."""
        return (
            self.kernels
            and self.weight.ndim == 1
            and runs_on(hidden_states, self.weight)
            and (self.fp32 or (not self.offset and self.weight.dtype == hidden_states.dtype))
            and not torch.compiler.is_compiling()
        )

    def _normed(self, hidden_states: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        # torch's kernel reduces low-precision input in fp32 and casts once, after the weight
        return F.rms_norm(hidden_states, hidden_states.shape[-1:], weight, self.eps)


class LayerNorm(_Norm):
    """``(x - mean(x)) / sqrt(var(x) + eps) * (weight + offset) + bias``; the arguments are `RMSNorm`'s."""

    def _normed(self, hidden_states: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(hidden_states, hidden_states.shape[-1:], weight, bias, self.eps)
