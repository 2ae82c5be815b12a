"""Between host and device without waiting: batches on their way there, numbers on their way back."""

from collections.abc import Mapping

import torch
from torch import Tensor


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """``batch`` on ``device``; to a GPU from pinned memory, so that the copy waits its turn and the host does not."""
    if device.type != "cuda":
        return {name: value.to(device) for name, value in batch.items()}
    return {
        name: (value if value.is_cuda else value.pin_memory()).to(device, non_blocking=True)
        for name, value in batch.items()
    }


class Numbers:
    """Scalars of a device, to be read when they are needed: the copy is queued here, behind what computes them.

    Args:
        scalars: on one device, of one element each.
    """

    def __init__(self, *scalars: Tensor):
        values = torch.stack([scalar.detach().double() for scalar in scalars])
        self._event: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """The values, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()
