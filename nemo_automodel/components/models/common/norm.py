"""Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467, equation 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, statistics in fp32, output in ``x``'s dtype.

    Args:
        dim: size of the last dimension; the weight's shape is ``[dim]``.
        eps: added to the mean square.
        fp32: upcast input and weight, so that a weight kept in higher precision than ``x`` is not rounded first.
        device: where the weight lives.
        dtype: the weight's dtype.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.eps = eps
        self.fp32 = fp32

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise ``[..., dim]``."""
        if self.fp32:
            normed = F.rms_norm(hidden_states.float(), self.weight.shape, self.weight.float(), self.eps)
            return normed.to(hidden_states.dtype)
        # torch's kernel reduces low-precision input in fp32 and casts once, after the weight
        return F.rms_norm(hidden_states, self.weight.shape, self.weight.to(hidden_states.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, fp32={self.fp32}"
