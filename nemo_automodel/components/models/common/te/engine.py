"""A module of Transformer Engine behind one of ours, which has the parameters, the names and the state dict."""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn


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


def package(name: str) -> Any:
    """The module ``name`` of Transformer Engine, which then computes with torch's own cuDNN."""
    _load_cudnn_of_torch()
    return import_module(f"transformer_engine.{name}")


@cache
def _load_cudnn_of_torch() -> None:
    """Before Transformer Engine finds the system's, which may be another version than the one torch brought along.

    Two of them in one process mix: either fails at a symbol of the other, or computes wrong gradients (head_dim 256).
    """
    found = find_spec("nvidia.cudnn") if find_spec("nvidia") is not None else None
    for place in (found.submodule_search_locations or []) if found is not None else []:
        # those that the others need come first: by name alone the loader may find the system's for them
        needed = ("libcudnn_graph", "libcudnn_ops")  # in this order, which is the alphabet's
        files = sorted(Path(place).glob("lib/libcudnn*.so.*"))
        libraries = sorted(files, key=lambda file: not file.name.startswith(needed))
        for library in libraries:
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        if libraries:
            os.environ.setdefault("CUDNN_HOME", str(place))  # where Transformer Engine looks first


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
