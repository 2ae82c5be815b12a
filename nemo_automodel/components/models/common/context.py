"""What a model asks of ranks that share its sequences (context parallelism)."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

Attention = Callable[..., tuple[Tensor, Any]]


class SharedSequence(Protocol):
    """How sequences are shared; modules that can compute a part of one declare a ``context`` that holds it, or None.

    Shapes: B batch, S sequence, s this rank's part of it, D head_dim.
    """

    def part(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of something whole, along ``dim``."""
        ...

    def whole_shape(self, x: Tensor) -> Tensor:
        """Nothing, of the device, dtype, batch and whole length that the part ``x`` ``[B, s, ...]`` belongs to."""
        ...

    def attend(
        self, attention: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **opts: Any
    ) -> tuple[Tensor, Any]:
        """``[B, heads, s, D] -> [B, s, heads, D]``: this rank's part of what ``attention`` gives whole sequences.

        Queries, keys and values are of the part, all else (the mask, positions) of whole sequences, as ``attention``,
        a function of transformers' interface, takes it.
        """
        ...
