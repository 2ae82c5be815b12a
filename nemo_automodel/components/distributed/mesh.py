"""How many ranks go along each axis of parallelism, and this rank's place among them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemo_automodel.components.distributed.stages import ZERO_BUBBLE, ScheduleName, check_schedule

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""From the outermost, whose neighbours are far apart, to the innermost: ranks of one ``tp`` group follow each other."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class MeshConfig:
    """How the ranks of a run share its work.

    Raises:
        ValueError: a size below one, or as many stages as the schedule does not have, by the field's name.
    """

    pp: int = _option(1, "ranks that share the layers (pipeline parallelism)")
    dp_replicate: int = _option(1, "whole copies of the model, each sharded over the other axes (HSDP)")
    dp_shard: int | None = _option(None, "ranks that share one copy's parameters and optimizer (FSDP2); null: the rest")
    cp: int = _option(1, "ranks that share each sequence (context parallelism)")
    cp_method: Literal["all_to_all", "ring"] = _option(
        "all_to_all", "how they attend to it: by heads, any attention; or ring: any heads, causal sdpa only"
    )
    tp: int = _option(1, "ranks that share each layer's products (tensor parallelism)")
    sequence_parallel: bool = _option(True, "with tp: what lies between the products is cut along the sequence")
    pp_schedule: ScheduleName = _option("1F1B", "with pp: the order in which stages compute micro-batches")  # noqa: RUF009
    pp_virtual_stages: int | None = _option(
        None, "with pp: stages of each rank; null: as few as the schedule takes (one, or two interleaved)"
    )
    pp_reduce_each: bool = _option(
        False, "with pp and dp_shard: FSDP reduces gradients with every micro-batch: less memory, more messages"
    )

    def __post_init__(self) -> None:
        check_schedule(self.pp_schedule, self.pp_virtual_stages)
        if self.pp_reduce_each and self.pp_schedule in ZERO_BUBBLE:
            raise ValueError(
                f"pp_reduce_each=true with pp_schedule={self.pp_schedule!r}, which computes weights' gradients out of "
                "FSDP's sight: leave it at false, or take another schedule"
            )
        for name in AXES:
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name}={size} must be at least 1")

    def sizes(self, ranks: int) -> dict[str, int]:
        """Axis -> its size, for so many ranks.

        Raises:
            ValueError: they are not a mesh of these sizes; the message says which ``dp_shard`` or number would do.
        """
        others = math.prod(getattr(self, name) for name in AXES if name != "dp_shard")
        shard = self.dp_shard if self.dp_shard is not None else ranks // others
        if shard * others != ranks or not shard:
            given = " x ".join(f"{name}={getattr(self, name)}" for name in AXES if getattr(self, name) not in (1, None))
            wanted = f"a multiple of {others}" if self.dp_shard is None else str(shard * others)
            raise ValueError(f"mesh: {given or 'the default'} takes {wanted} ranks, and there are {ranks}")
        return {name: shard if name == "dp_shard" else getattr(self, name) for name in AXES}


class Mesh:
    """The ranks of a run by axis. Of one rank it needs no process group.

    Args:
        sizes: axis -> ranks along it; those left out have one.
        device_type: of the ranks' tensors.
        sequence_parallel: whether ``tp`` ranks cut along the sequence what lies between the layers' products.
        cp_method: how ``cp`` ranks attend to the sequences that they share.

    Attributes:
        pp, dp_replicate, dp_shard, cp, tp: the sizes.
        place: this rank's coordinate along each axis.
    """

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int

    def __init__(
        self,
        sizes: Mapping[str, int] | None = None,
        device_type: str = "cpu",
        sequence_parallel: bool = True,
        cp_method: Literal["all_to_all", "ring"] = "all_to_all",
    ):
        self.sizes = {name: (sizes or {}).get(name, 1) for name in AXES}
        self.__dict__.update(self.sizes)
        self.size = math.prod(self.sizes.values())
        self.device_type, self.sequence_parallel, self.cp_method = device_type, sequence_parallel, cp_method
        self.place = self.place_of(dist.get_rank() if self.size > 1 else 0)

    def place_of(self, rank: int) -> dict[str, int]:
        """A rank's coordinate along each axis."""
        place = {}
        for name in reversed(AXES):
            rank, place[name] = divmod(rank, self.sizes[name])
        return place

    @property
    def data(self) -> int:
        """Ranks, or groups of them, that have rows of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def data_rank(self) -> int:
        """Which rows are this rank's."""
        return self.place["dp_replicate"] * self.dp_shard + self.place["dp_shard"]

    @property
    def averaged(self) -> int:
        """Ranks over which FSDP averages gradients, each of which has some tokens' part of the sum."""
        return self.data * self.cp

    @property
    def sharers(self) -> int:
        """Ranks that have the same rows."""
        return self.size // self.data

    @property
    def sequence_cut(self) -> int:
        """Parts into which ranks cut a sequence, whose length must be a multiple of it."""
        pieces = 2 * self.cp if self.cp > 1 and self.cp_method == "ring" else self.cp
        return pieces * (self.tp if self.sequence_parallel else 1)

    @property
    def stage(self) -> int:
        """Ranks that have the same layers, whole or in shards."""
        return self.size // self.pp

    @cached_property
    def torch_mesh(self) -> DeviceMesh | None:
        """torch's mesh of the axes ``pp``, ``dp_replicate``, ``fsdp`` (``dp_shard`` and ``cp``), ``tp``; longer ones.

        None for one rank. All ranks ask for the first time together.
        """
        axes = {"pp": self.pp, "dp_replicate": self.dp_replicate, "fsdp": self.dp_shard * self.cp, "tp": self.tp}
        # an axis of one rank would be a process group for every rank there is
        kept = {n: size for n, size in axes.items() if size > 1 or (n == "fsdp" and self.dp_replicate > 1)}
        if not kept:
            return None
        return init_device_mesh(self.device_type, tuple(kept.values()), mesh_dim_names=tuple(kept))

    def axis(self, *names: str) -> DeviceMesh | None:
        """torch's mesh of these axes (`torch_mesh` names them) as far as they are there; None: none is."""
        if self.torch_mesh is None:
            return None
        there = tuple(name for name in names if name in (self.torch_mesh.mesh_dim_names or ()))
        return self.torch_mesh[there] if there else None

    @cached_property
    def cp_group(self) -> dist.ProcessGroup | None:
        """The ranks that share this rank's sequences, in the sequence's order; None: it has whole ones."""
        if self.cp == 1:
            return None
        ranks = torch.arange(self.size).view(-1, self.cp, self.tp).transpose(1, 2).flatten(0, 1)
        return dist.new_subgroups_by_enumeration(ranks.tolist())[0]

    def part(self, x: Tensor, dim: int = 1) -> Tensor:
        """What this rank has, of the ``cp`` that share it, of sequences that lie whole along ``dim``."""
        return part_of(x, self.place["cp"], self.cp, dim, balanced=self.cp_method == "ring")

    def __str__(self) -> str:
        return " x ".join(f"{name}={size}" for name, size in self.sizes.items() if size > 1) or "one rank"


def part_of(x: Tensor, rank: int, ranks: int, dim: int = 1, balanced: bool = False) -> Tensor:
    """What ``rank`` of ``ranks`` has of ``x``, which is whole, along ``dim``.

    Args:
        x: sequences.
        rank: whose part.
        ranks: that share them.
        dim: along which they are cut.
        balanced: cut into two pieces for each rank, of which it has one counted from the front and one from the back:
            the first tokens see few others, the last ones many.

    Raises:
        ValueError: the pieces do not divide it.
    """
    if ranks == 1:
        return x
    pieces = 2 * ranks if balanced else ranks
    if x.shape[dim] % pieces:
        raise ValueError(
            f"{ranks} context-parallel ranks cannot share a sequence of {x.shape[dim]} tokens: pad it to a multiple of "
            f"{pieces}"
        )
    chunks = x.chunk(pieces, dim)
    return torch.cat((chunks[rank], chunks[-1 - rank]), dim) if balanced else chunks[rank]


ALONE = Mesh()
"""One process."""


@dataclass(frozen=True)
class Divided:
    """A number of a model that an axis divides.

    Attributes:
        what: the number's name, in words.
        count: the number.
        axis: of the mesh.
        into: by how much the axes inside divide it already.
    """

    what: str
    count: int
    axis: Literal["pp", "cp", "tp"]
    into: int = 1


def check_divides(mesh: Mesh, numbers: Sequence[Divided]) -> None:
    """Refuse a mesh that the model does not divide into.

    Raises:
        ValueError: a line for each axis that does not divide a number; it says which sizes would.
    """
    problems = []
    for number in numbers:
        size, each = mesh.sizes[number.axis], number.count // number.into
        if size > 1 and (number.count % number.into or each % size):
            fitting = [n for n in range(2, each + 1) if each % n == 0]
            problems.append(
                f"{number.axis}={size} does not divide the {number.count} {number.what}"
                + (f" ({each} with tp={number.into})" if number.into > 1 else "")
                + (f"; {number.axis} may be {', '.join(map(str, fitting[:12]))}" if fitting else "; leave it at 1")
            )
    if problems:
        raise ValueError("mesh: " + "\n  ".join(problems))
