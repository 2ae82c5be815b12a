"""Ranks that write one folder together: what one of them does for all, and failures that every one hears of."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from nemo_automodel.components.checkpoint.reading import CheckpointError


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
            CheckpointError: it failed on another rank only.
            Exception: what ``work`` raised here.
        """
        error: BaseException | None = None
        if everywhere or self.leads:
            try:
                work()
            except BaseException as raised:
                error = raised
        failed = self._any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise CheckpointError("another rank failed while saving (its own message says why); nothing was published")

    def _any(self, flag: bool) -> bool:
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag), device=self._device())
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    @staticmethod
    def _device() -> torch.device:
        if "gloo" in str(dist.get_backend_config()):
            return torch.device("cpu")
        return torch.accelerator.current_accelerator() or torch.device("cpu")
