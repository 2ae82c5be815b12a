"""Whether ranks that should hold the same numbers still do."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from nemo_automodel.components.distributed.mesh import Mesh
from nemo_automodel.components.placement import local

PIECE = 2**24
"""Elements that are hashed at once: eight bytes of scratch memory each, a few times."""

DRAWS = "the random generator"
"""Name of its state, among the tensors that ranks hold copies of."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = -7046029254386353131  # 2^64 over the golden ratio: neighbouring places get factors that are far apart


def diverged(
    tensors: Mapping[str, Tensor], mesh: Mesh, shared: Mapping[str, dist.ProcessGroup] | None = None
) -> dict[str, str]:
    """Names of tensors that differ between ranks that hold copies -> the axes of the mesh along which they do.

    Along ``tp`` the state of the random generators, `DRAWS`, is such a tensor too: ranks drop alike what all compute.

    Args:
        tensors: the same names in the same order on every rank of a pipeline stage, all of which call this; plain
            (copies everywhere) or DTensors (copies along the axes that do not cut them).
        mesh: of all ranks.
        shared: of those that two pipeline stages have, name -> the ranks with one copy each.
    """
    found: dict[str, str] = {}
    for axis in ("dp_replicate", "fsdp", "tp"):
        if (ranks := mesh.axis(axis)) is None:
            continue
        copies = {name: tensor for name, tensor in tensors.items() if not _cut_along(tensor, axis)}
        if copies and axis == "tp":
            copies[DRAWS] = _random_state(local(next(iter(copies.values()))).device)
        for name in _unlike(copies, ranks.get_group()) if copies else ():
            found[name] = f"{found[name]}, {axis}" if name in found else axis
    for name, group in (shared or {}).items():
        if _unlike({name: tensors[name]}, group):
            found[name] = f"{found[name]}, pp" if name in found else "pp"
    return found


def _random_state(device: torch.device) -> Tensor:
    """Of the generators of the host and of ``device``, bytes on it."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return torch.cat(states).to(device)


def _unlike(copies: Mapping[str, Tensor], group: dist.ProcessGroup) -> list[str]:
    low = torch.stack([fingerprint(copy) for copy in copies.values()])
    high = low.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group)
    return [name for name, differs in zip(copies, (low != high).tolist(), strict=True) if differs]


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """An int64 scalar that depends on every bit of this rank's part of ``tensor``, and on its place."""
    own = local(tensor.detach())
    bits = own.contiguous().view(_BITS[own.element_size()]).flatten()
    total = torch.zeros((), dtype=torch.int64, device=own.device)
    for start in range(0, len(bits), PIECE):
        piece = bits[start : start + PIECE].to(torch.int64)
        places = torch.arange(start, start + len(piece), device=piece.device)
        total += ((piece + 1) * (places * _ODD + 1)).sum()  # wraps around, everywhere alike
    return total


def _cut_along(tensor: Tensor, axis: str) -> bool:
    if not isinstance(tensor, DTensor):
        return False
    names = tensor.device_mesh.mesh_dim_names or ()
    return axis in names and not tensor.placements[names.index(axis)].is_replicate()
