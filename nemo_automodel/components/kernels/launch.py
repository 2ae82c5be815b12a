"""Triton where it is installed, and whether a kernel can run on a tensor. Everything else in this room starts here."""

import os
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if find_spec("triton") is not None:
    import triton
    import triton.language as tl

    jit: Callable[..., Any] = triton.jit
    _registered: Callable[..., Any] = torch.library.triton_op
else:  # kernels are then defined, never launched: `runs_on` says no, and the PyTorch reference serves
    triton, tl = None, SimpleNamespace(constexpr=None)  # type: ignore[assignment]

    def jit(kernel: Any = None, **options: Any) -> Any:
        return kernel if kernel is not None else jit

    _registered = torch.library.custom_op  # the other one warns that there is no triton, once for each operator


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernels in Python, on the CPU as well: slowly, to test them."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of the tensors that kernels read and write; they compute in fp32."""


def runs_on(*tensors: Tensor | None) -> bool:
    """Whether a kernel can take these tensors (None: not there): plain ones, on a GPU, in one of `DTYPES`."""
    return triton is not None and all(
        (tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu"))
        and tensor.dtype in DTYPES
        and not isinstance(tensor, DTensor)
        for tensor in tensors
        if tensor is not None
    )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def untouched(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether a call of ``module`` is the forward pass of its class, one of ``types``, and nothing else: no hooks."""
    return (
        type(module) in types
        and "forward" not in module.__dict__
        and not any(getattr(module, name) for name in _HOOKS)
        and not any(getattr(nn.modules.module, f"_global{name}") for name in _HOOKS)
    )


def unwatched() -> bool:
    """Whether torch only computes: no compiler traces, no mode sees what is called, no gradient will be asked for."""
    return not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch.is_grad_enabled())


def called_directly(registered: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, called as the operator of torch that it is ``registered`` as only where somebody would see that.

    An operator written in Python takes longer to call than a kernel to launch, and small models wait for the host.
    What it mutates must be memory of its own caller: called directly, autograd is not told.
    """

    @wraps(function)
    def call(*arguments: Any) -> Any:
        return function(*arguments) if unwatched() else registered(*arguments)

    return call


def operator(name: str, mutates_args: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that launches kernels as an operator of torch, and call it as `called_directly` does."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        return called_directly(_registered(name, function, mutates_args=mutates_args), function)

    return register


def wrapped(kernel: Any) -> Any:
    """The kernel as `torch.compile` sees it (an interpreted one, and where nobody looks, as it is)."""
    return kernel if INTERPRETED or unwatched() else torch.library.wrap_triton(kernel)


def rows(tensor: Tensor) -> Tensor:
    """``[..., n] -> [rows, n]``, channels next to each other; a view wherever strides allow it."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` in fp32, not rounded on the way where the device can leave that out."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@jit
def fp32(number):  # type: ignore[no-untyped-def]
    """A kernel's scalar argument in fp32, as Triton passes it; Inductor makes it fp64, and all that it touches."""
    return tl.cast(number, tl.float32)


def power_of_two(n: int) -> int:
    """The least one that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()
