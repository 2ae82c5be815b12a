"""Bytes that a rank sends in collectives: counted while they happen, by axis of the mesh.

One convention for what is counted and for what `recipes.plan` predicts, that of the ring (Thakur, Rabenseifner & Gropp
2005): of a tensor of B bytes on n ranks each rank sends ``sent(kind, B, n)``, whatever the backend does instead.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_automodel.components.distributed.mesh import Mesh

KINDS = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_into_tensor_out": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
    "all_to_all_single": "all-to-all",
    "send": "send",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
}
"""Operation of torch -> what it is. A message is counted where it is sent."""

_SILENT = {"wait_tensor", "recv_", "recv_any_source_", "barrier", "monitored_barrier_", "_wrap_tensor_autograd"}


def sent(kind: str, size: int, ranks: int) -> int:
    """Bytes that each of ``ranks`` ranks sends, of a tensor that is ``size`` bytes where it is whole."""
    if kind in ("send", "broadcast"):
        return size
    return size * (ranks - 1) * (2 if kind == "all-reduce" else 1) // ranks


class Traffic(TorchDispatchMode):
    """Within the block every collective of this rank is counted.

    Args:
        mesh: whose axes the groups are; its groups are made here where they are not there yet, by all ranks.

    Attributes:
        bytes: (axis, kind) -> bytes that this rank sent. ``fsdp`` is ``dp_shard`` and ``cp`` together, ``cp`` what
            attention exchanges. The run's own numbers (losses, counts, norms: float64, which no model is in) are
            those of the axis ``numbers``.
    """

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self._mesh, whole = mesh, mesh.torch_mesh
        self._axes = {} if whole is None else {whole.get_group(n).group_name: n for n in whole.mesh_dim_names or ()}
        if mesh.cp_group is not None:
            self._axes[mesh.cp_group.group_name] = "cp"

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it becomes operations on plain tensors, which come here
        result = func(*args, **(kwargs or {}))
        if getattr(func, "namespace", "") in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._count(func._overloadpacket.__name__, [*args, *(kwargs or {}).values()], result)
        return result

    def _count(self, name: str, args: list[Any], result: Any) -> None:
        if name in _SILENT:
            return
        if name not in KINDS:
            raise NotImplementedError(f"{name}: a collective that Traffic does not know how to count")
        kind, group = KINDS[name], next(filter(None, map(_group_of, args)))
        tensors = [leaf for leaf in tree_leaves([args, result]) if isinstance(leaf, Tensor)]
        # what is whole is the larger of a collective's two sides; an all-to-all's are equal
        size = max(t.nbytes for t in tensors)
        if name in ("allgather_", "alltoall_"):  # lists: the whole is in parts
            size = sum(t.nbytes for t in tree_leaves(args[0]))
        axis = self._axes.get(group.group_name) or self._crossed(dist.get_process_group_ranks(group))
        if tensors[0].dtype == torch.float64 or size <= 8:  # pipeline ranks also say that they are there
            axis = "numbers"
        count = sent(kind, size, group.size())
        if kind == "all-to-all" and (splits := [arg for arg in args if isinstance(arg, list) and _numbers(arg)]):
            count = size - size * splits[-1][group.rank()] // sum(splits[-1])  # what goes where, in parts of any size
        self.bytes[axis, kind] += count

    def _crossed(self, ranks: list[int]) -> str:
        """The axes along which ``ranks`` differ."""
        places = [self._mesh.place_of(rank) for rank in ranks]
        return ",".join(name for name in places[0] if len({place[name] for place in places}) > 1)

    def by_axis(self) -> dict[str, int]:
        """Axis -> bytes."""
        sums: Counter[str] = Counter()
        for (axis, _), count in self.bytes.items():
            sums[axis] += count
        return dict(sums)


def _numbers(argument: list[Any]) -> bool:
    return bool(argument) and all(isinstance(each, int) for each in argument) and sum(argument) > 0


def _group_of(arg: Any) -> dist.ProcessGroup | None:
    """The process group that an operation's argument is, or names."""
    if isinstance(arg, dist.ProcessGroup):
        return arg
    if isinstance(arg, torch.ScriptObject):
        return dist.ProcessGroup.unbox(arg) if "ProcessGroup" in str(arg._type()) else None
    if isinstance(arg, str) and arg not in ("sum", "max", "avg", "min"):
        return _resolve_process_group(arg)  # type: ignore[arg-type]  # a kind of str to torch 2.13
    return None
