"""The ranks of a run: what one of them does for all, what they add up, and failures that every one hears of. A leaf."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class AnotherRankFailed(RuntimeError):
    """This rank did its part of a common piece of work, and another one could not."""


class Together:
    """The ranks of the default process group, or this process alone.

    Every method is called by all ranks, in the same order.

    Args:
        alone: leave other ranks out even where there are some.
    """

    def __init__(self, alone: bool = False):
        several = not alone and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if several else 0
        self.size = dist.get_world_size() if several else 1

    @property
    def leads(self) -> bool:
        """Whether this rank does what is done once."""
        return self.rank == 0

    def run(self, work: Callable[[], None], *, everywhere: bool = True) -> None:
        """Call ``work``, on all ranks or on the leading one, and go on when all are done.

        Raises:
            AnotherRankFailed: it failed on another rank only.
            Exception: what ``work`` raised here.
        """
        error: BaseException | None = None
        if everywhere or self.leads:
            try:
                work()
            except BaseException as raised:
                error = raised
        failed = self.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise AnotherRankFailed("another rank failed in what all do together; its own message says why")

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank."""
        return self.sum(float(flag)) > 0

    def sum(self, value: float) -> float:
        """The sum of every rank's ``value``, in float64."""
        if self.size == 1:
            return value
        return float(self.add(torch.tensor(value, dtype=torch.float64, device=_device())))

    def add(self, value: Tensor) -> Tensor:
        """The sum of every rank's ``value``, in float64 and on its device, which the host does not wait for."""
        total = value.detach().to(torch.float64, copy=True)
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def gather(self, value: Tensor) -> Tensor:
        """Every rank's ``value``, a CPU tensor of one shape: ``[ranks, ...]``, the same on all."""
        if self.size == 1:
            return value[None].clone()
        values = [torch.empty_like(value, device=_device()) for _ in range(self.size)]
        dist.all_gather(values, value.to(_device()))
        return torch.stack(values).cpu()


def _device() -> torch.device:
    if "gloo" in str(dist.get_backend_config()):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
