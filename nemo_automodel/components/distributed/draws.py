"""Random numbers of tensor-parallel ranks: the same ones where they compute the same, each its own elsewhere.

The generators of ranks that share layers' products are in one state, so that what all compute drops the same. A rank's
own numbers come from a seed that all draw together: there is no second state that a checkpoint would have to hold, and
a layer that is computed again, from the state that it began with, draws what it drew.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

_common: list[Tensor] = []
"""The state that all ranks' generators have in common, while this rank draws its own."""


@contextmanager
def own_draws(mesh: DeviceMesh) -> Iterator[None]:
    """Within, random numbers on the mesh's devices are this rank's own."""
    if _common:
        yield
        return
    seeds = torch.randint(2**62, (mesh.size(),), device="cpu")  # drawn on the host: nobody waits for a GPU
    generator = _generator(mesh)
    _common.append(generator.get_state())
    generator.manual_seed(int(seeds[mesh.get_local_rank()]))
    try:
        yield
    finally:
        generator.set_state(_common.pop())


@contextmanager
def common_draws(mesh: DeviceMesh) -> Iterator[None]:
    """Within, random numbers on the mesh's devices are those of all its ranks, also where they draw their own."""
    if not _common:
        yield
        return
    generator = _generator(mesh)
    own = generator.get_state()
    generator.set_state(_common.pop())
    try:
        yield
    finally:
        _common.append(generator.get_state())
        generator.set_state(own)


def draw_own(module: nn.Module, mesh: DeviceMesh) -> None:
    """Let ``module`` draw random numbers of this rank's own while it trains."""
    inner: Callable[..., Any] = module.forward

    @wraps(inner)  # models look at what it takes
    def forward(itself: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not itself.training:
            return inner(*args, **kwargs)
        with own_draws(mesh):
            return inner(*args, **kwargs)

    module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def is_dropout(module: nn.Module) -> bool:
    """Whether ``module`` is torch's dropout, with something to drop."""
    return isinstance(module, nn.Dropout) and module.p > 0


def drops(module: nn.Module) -> bool:
    """Whether ``module`` has dropout in it, as torch's modules."""
    return any(map(is_dropout, module.modules()))


def draws_of(mesh: DeviceMesh, own: bool) -> AbstractContextManager[None]:
    """`own_draws` or `common_draws`."""
    return own_draws(mesh) if own else common_draws(mesh)


def _generator(mesh: DeviceMesh) -> torch.Generator:
    if mesh.device_type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device()]
    return torch.default_generator
