"""Between host and device without waiting: batches on their way there, numbers on their way back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nemo_automodel.components.models.common.varlen import Documents, takes_bounds
from nemo_automodel.components.placement import sent


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """``batch`` on ``device``, without waiting for it.

    Labels, and targets, stay where they are: which positions have one is asked on the host.
    An ``attention_mask`` that only tells of padding on the right is left out: no token of a causal model sees what
    follows it, and padding has no labels. Where there is a mask, transformers asks the device what is in it and waits,
    and attention takes slower kernels.
    """
    moved = {}
    for name, value in batch.items():
        if name in ("labels", "targets"):
            moved[name] = value
        elif name != "attention_mask" or not _on_the_right(value):
            moved[name] = sent(value, device)
    return moved


def inputs_of(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Any]:
    """``batch`` on ``device``, and for attention that wants to know where documents begin, found here on the host."""
    inputs: dict[str, Any] = to_device(batch, device)
    config = getattr(model, "config", None)
    if "position_ids" in batch and takes_bounds(getattr(config, "_attn_implementation", None)):
        bounds, longest = Documents.of(batch["position_ids"])
        inputs |= Documents(sent(bounds, device), longest).as_inputs()
    return inputs


def _on_the_right(mask: Tensor) -> bool:
    """Whether each row of a mask ``[rows, tokens]`` on the CPU is ones, then zeros."""
    return mask.device.type == "cpu" and mask.ndim == 2 and bool((mask[:, 1:] <= mask[:, :-1]).all())


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
