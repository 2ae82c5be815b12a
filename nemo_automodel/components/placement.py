"""Tensors that may be sharded (the whole of one, whole values into one), and on their way to a device. A leaf."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of ``tensor``: its shard of a DTensor, all of a plain one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, detached; gathered (by every rank together) where it is a DTensor."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy ``value``, the same on every rank, into ``tensor`` or this rank's shard of it; casts, moves devices.

    Raises:
        ValueError: ``tensor`` is on the meta device, where a copy would vanish.
    """
    if tensor.is_meta:
        raise ValueError("the model is on the meta device: load or initialize its weights first")
    if isinstance(tensor, DTensor):
        shard = tensor.to_local()
        # every rank holds the same values already: no broadcast
        value = distribute_tensor(
            value.to(shard.device), tensor.device_mesh, tensor.placements, src_data_rank=None
        ).to_local()
        tensor = shard
    tensor.copy_(value)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; to a GPU from pinned memory, so that the copy waits its turn and the host does not."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
