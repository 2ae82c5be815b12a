"""Run a model in float64 throughout, its deliberate upcasts to float32 included."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Exact(TorchFunctionMode):
    """Inside this context every cast to float32 is one to float64.

    Norms, softmax and RoPE of a model in float64 round to float32 on the way (``x.float()``, ``dtype=torch.float32``),
    and would hide differences below 1e-7. Tables that are in float32 already, such as RoPE's frequencies, keep their
    values.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(_wider(value) for value in args)
        return func(*args, **{name: _wider(value) for name, value in (kwargs or {}).items()})


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
