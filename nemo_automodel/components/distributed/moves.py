"""How a tensor that lies over ranks in one way comes to lie in another, and its gradient back.

Ways to lie are DTensor's placements, and the results are its own; but the collectives are called right away: DTensor
asks its rules anew each time, a fifth to a third of what a small layer took the host.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

WHOLE, TERM, ROWS, COLUMNS, CHANNELS, SEQUENCE = Replicate(), Partial(), Shard(0), Shard(1), Shard(-1), Shard(1)


def moved(
    x: Tensor, mesh: DeviceMesh, given: Placement, wanted: Placement, *, term: bool = False, width: int | None = None
) -> Tensor:
    """``x``, that lies over the ranks as ``given``, as ``wanted``; its gradient the other way.

    Args:
        x: this rank's.
        mesh: the ranks, of one axis.
        given: how the ranks' tensors make up the whole.
        wanted: how they shall.
        term: whether the gradients of a whole ``x`` are the ranks' terms of a sum.
        width: channels of the whole, where the ranks' parts need not be equal.
    """
    if given == wanted and not term:
        return x
    forth, back = _way(given, wanted), _way(TERM if term else wanted, WHOLE if given == TERM else given)
    whole = x.shape[forth.dim] if forth is not None and forth.kind in ("cut", "scatter") else width or 0
    if forth is None or back is None or whole % mesh.size():
        return _by_dtensor(x, mesh, given, wanted, term, width)
    ranks = _Ranks(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())
    result: Tensor = _Moved.apply(x, tuple(forth), tuple(back), tuple(ranks))  # type: ignore[no-untyped-call]
    return result


class _Way(NamedTuple):
    """A name in `_COLLECTIVES`, and the dimension that is cut."""

    kind: str
    dim: int = 0


class _Ranks(NamedTuple):
    """A group's name, how many they are, and this one's number."""

    name: str
    size: int
    rank: int


def _way(given: Placement, wanted: Placement) -> _Way | None:
    """None: from one dimension to another."""
    if given == wanted:
        return _Way("stay")
    if isinstance(wanted, Shard):
        kind = {WHOLE: "cut", TERM: "scatter"}.get(given)
        return None if kind is None else _Way(kind, wanted.dim)
    return _Way("gather", given.dim) if isinstance(given, Shard) else _Way("sum")


def _by_dtensor(
    x: Tensor, mesh: DeviceMesh, given: Placement, wanted: Placement, term: bool, width: int | None
) -> Tensor:
    """What has parts of unequal sizes, or is cut along another dimension."""
    shape: dict[str, Any] = {}
    if width is not None:
        whole = torch.Size((*x.shape[:-1], width))
        shape = {"shape": whole, "stride": torch.empty(whole, device="meta").stride()}
    spread = DTensor.from_local(x, mesh, [given], run_check=False, **shape)
    result = spread.redistribute(placements=[wanted]).to_local(grad_placements=[TERM] if term else None)
    return result.contiguous()  # what was gathered along the sequence is not, and models take views of it


def _gather(x: Tensor, dim: int, ranks: _Ranks) -> Tensor:
    parts = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), ranks.size, ranks.name)
    return torch.cat(_wait(parts).chunk(ranks.size), dim)


def _scatter(x: Tensor, dim: int, ranks: _Ranks) -> Tensor:
    parts = torch.cat(x.chunk(ranks.size, dim))
    return _wait(torch.ops._c10d_functional.reduce_scatter_tensor(parts, "sum", ranks.size, ranks.name))


def _sum(x: Tensor, _: int, ranks: _Ranks) -> Tensor:
    return _wait(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", ranks.name))


def _wait(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)  # type: ignore[no-any-return]


def _cut(x: Tensor, dim: int, ranks: _Ranks) -> Tensor:
    # not contiguous(), which may be a view: torch 2.11's compiler lets the gradient of one go past `_Moved`
    return x.chunk(ranks.size, dim)[ranks.rank].clone(memory_format=torch.contiguous_format)


_COLLECTIVES: Mapping[str, Callable[[Tensor, int, _Ranks], Tensor]] = {
    "stay": lambda x, dim, ranks: x.view_as(x),
    "cut": _cut,
    "gather": _gather,
    "scatter": _scatter,
    "sum": _sum,
}


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forth: tuple[str, int], back: tuple[str, int], ranks: Any) -> Tensor:
        ctx.back, ctx.ranks = back, ranks
        return _go(x, forth, ranks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _go(gradients[0], ctx.back, ctx.ranks), None, None, None


def _go(x: Tensor, way: tuple[str, int], ranks: Any) -> Tensor:
    kind, dim = way
    return _COLLECTIVES[kind](x, dim, _Ranks(*ranks))
