"""A module of Transformer Engine behind one of ours, which has the parameters, the names and the state dict."""

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from nemo_automodel.components.models.common import cudnn


class Engine:
    """Makes Transformer Engine's module at the first call, and lends it the parameters at each.

    No submodule: Transformer Engine's cannot be made without a GPU, fills parameters on meta by itself, and pickles an
    ``_extra_state`` into state dicts. A copy of a module, which tensor parallelism makes, computes with the same one;
    a deep copy, or one that was pickled, with a new one.

    Args:
        make: makes the module, on the meta device.
    """

    def __init__(self, make: Callable[[], nn.Module]):
        self._make = make
        self._made: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._make,)

    def made(self) -> Any:
        """Transformer Engine's module."""
        if self._made is None:
            self._made = self._make()
        return self._made

    @torch.compiler.disable  # its own autograd functions ask the host about the device
    def __call__(self, x: Tensor, **parameters: Tensor) -> Tensor:
        """What it makes of ``x`` with these parameters: plain tensors, which may be shards.

        Raises:
            ValueError: ``x`` is not on a GPU.
        """
        refuse_off_gpu(x)
        made = self.made()
        made._parameters.update(parameters)  # not setattr, which wants parameters, and these may be views of some
        output: Tensor = made(x)
        return output


@cache
def package(name: str) -> Any:
    """The module ``name`` of Transformer Engine, which computes with the cuDNN that torch has loaded.

    Left alone it loads the system's. Two versions in one process mix: either fails at a symbol of the other, or
    computes wrong gradients (of head_dim 256, on an H200).

    Raises:
        ImportError: two are loaded all the same, because somebody imported it before.
    """
    if "transformer_engine" not in sys.modules:
        cudnn.load_the_rest()
    made = import_module(f"transformer_engine.{name}")
    if (words := cudnn.mixed()) is not None:
        raise ImportError(f"Transformer Engine would compute with {words}")
    return made


def refuse_off_gpu(x: Tensor | None = None) -> None:
    """Raise a ValueError where Transformer Engine does not compute on the device of ``x``; None: anywhere here."""
    if x is None and not torch.cuda.is_available():
        _refuse("there is none")
    if x is not None and not x.is_cuda:
        _refuse(f"this model is on {x.device.type}")


def _refuse(where: str) -> NoReturn:
    raise ValueError(
        f"Transformer Engine computes on CUDA only, and {where}: choose backend.attn='sdpa', backend.linear='torch', "
        "backend.rms_norm='torch' and backend.rope_fusion=False"
    )
