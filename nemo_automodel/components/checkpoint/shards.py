"""Which part of a parameter this rank holds: plain tensors and DTensors alike."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # what torch's own checkpoints use


@dataclass(frozen=True)
class Region:
    """The box of a parameter that one rank holds.

    Attributes:
        offset: its first index in each dim.
        shape: its size in each dim.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Region":
        """This rank's region of ``tensor``; a plain tensor's is all of it."""
        if not isinstance(tensor, DTensor):
            return cls((0,) * tensor.ndim, tuple(tensor.shape))
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        return cls(tuple(offset), tuple(shape))


def empty_local(like: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Memory, not yet filled, for this rank's region of ``like``."""
    return torch.empty(Region.of(like).shape, dtype=dtype, device=device)


def with_local(like: Tensor, local: Tensor) -> Tensor:
    """``local`` as the shard of a tensor placed as ``like`` is; as it is where ``like`` is plain."""
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
