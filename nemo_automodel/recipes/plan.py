"""What a training would need on many ranks, found out on none of them: `automodel plan`.

Every kind of rank is built in turn by the training's own code, on the meta device, over torch's fake process group.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from nemo_automodel._transformers.auto_model import read_config
from nemo_automodel.components.distributed import Mesh
from nemo_automodel.recipes.building import build_optimizer, build_parts, build_pipeline
from nemo_automodel.recipes.checks import blame
from nemo_automodel.recipes.flops import arithmetic
from nemo_automodel.recipes.meshes import build_mesh
from nemo_automodel.recipes.needs import (
    ACTIVATIONS,
    GATHERED,
    Work,
    activation_bytes,
    gathered_bytes,
    gradient_bytes,
    local,
    traffic,
    work_of,
)

if TYPE_CHECKING:
    from nemo_automodel.recipes.train import TrainConfig

GIB, GB = 2**30, 1e9
T = TypeVar("T")


@dataclass(frozen=True)
class RankNeeds:
    """Bytes that one rank needs.

    Attributes:
        rank: its number.
        stage: its pipeline stage.
        parameters, gradients, optimizer: of its shards; counted.
        gathered, activations: estimates, as `needs` tells.
        sent: axis -> bytes in an optimizer step.
        elements: of the whole parameters that it has shards of.
        trained: likewise, of those that are trained.
    """

    rank: int
    stage: int
    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    sent: dict[str, int]
    elements: int
    trained: int

    @property
    def total(self) -> int:
        """Bytes of memory."""
        return self.parameters + self.gradients + self.optimizer + self.gathered + self.activations


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        mesh: of all ranks, from one rank's place.
        dtype: of the weights.
        work: of each rank, in a step.
        flops: of the model in a step, over all ranks.
        ranks: the first and the last rank of each pipeline stage: what does not divide lies on the first ones.
        notes: what the user should know.
    """

    mesh: Mesh
    dtype: str
    work: Work
    flops: float
    ranks: list[RankNeeds]
    notes: list[str]

    def lines(self) -> list[str]:
        """For the user."""
        work = self.work
        stages = {needs.stage: needs for needs in self.ranks}.values()
        whole, trained = (sum(getattr(needs, name) for needs in stages) for name in ("elements", "trained"))
        lines = [
            f"{self.mesh.size} ranks ({self.mesh}): {whole / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M trained, "
            f"{self.dtype}",
            f"a step: {work.global_tokens:,} tokens, {self.flops / 1e15:,.3f} model PFLOP; of a rank {work.rows} rows "
            f"of {work.length} tokens in {work.micro_batches} micro-batches",
            "",
            "GiB of memory: counted, and by estimate (*)",
            _row("rank", "stage", "parameters", "gradients", "optimizer", "gathered*", "activations*", "sum"),
        ]
        for each in self.ranks:
            parts = (each.parameters, each.gradients, each.optimizer, each.gathered, each.activations, each.total)
            lines.append(_row(each.rank, each.stage, *(f"{part / GIB:,.3f}" for part in parts)))
        axes = sorted({axis for each in self.ranks for axis in each.sent})
        if axes:
            lines += ["", "GB sent in a step, by axis", _row("rank", "stage", *axes)]
            for each in self.ranks:
                lines.append(_row(each.rank, each.stage, *(f"{each.sent.get(axis, 0) / GB:,.3f}" for axis in axes)))
        remarks = [*self.notes, f"* {GATHERED}", f"* {ACTIVATIONS}"]
        return [*lines, "", *(line for remark in remarks for line in wrap(remark, 118, subsequent_indent="  "))]


def plan(config: "TrainConfig", ranks: int) -> Plan:
    """What the training that ``config`` describes would need on ``ranks`` ranks.

    Of the model only its ``config.json`` is read, of the data nothing. ``model.dtype`` and the kernels that are
    ``auto`` are those of a GPU, unless ``train.device`` is ``cpu``.

    Raises:
        ValueError: the sizes are not a mesh of so many ranks, the model does not divide into them, or this process
            has other ranks already.
    """
    if ranks < 1:
        raise ValueError(f"--ranks {ranks} must be at least 1")
    if dist.is_initialized():
        raise ValueError("plan pretends to be rank after rank: call it in a process that has not joined any others")
    config = _planned(config)
    with pretended(0, ranks):
        mesh = build_mesh(config, torch.device("cpu"))
        work = work_of(config, mesh)
    kinds = {place for stage in range(mesh.pp) for place in (stage * mesh.stage, (stage + 1) * mesh.stage - 1)}
    needs = list(in_processes(_needs, [(config, rank, ranks) for rank in sorted(kinds)]))
    with blame("model.path"):
        flops = arithmetic(config.model.path, work.length).per_token(config.lora is None) * work.global_tokens
    return Plan(mesh, config.model.dtype, work, flops, needs, _notes(config, mesh))


def in_processes(function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> Iterator[T]:
    """``function`` of each of ``arguments``, each called in a process of its own.

    A process can be one rank only: torch keeps what it worked out for a mesh, and finds it again by the mesh's ranks
    alone, with the place of the rank that it was then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    workers = min(len(arguments), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as processes:
        yield from processes.map(function, *zip(*arguments, strict=True))


@contextmanager
def pretended(rank: int, ranks: int) -> Iterator[None]:
    """Within the block this process is ``rank`` of ``ranks`` that are not there: collectives do nothing."""
    if ranks == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend; torch's tests only

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _planned(config: "TrainConfig") -> "TrainConfig":
    """``config`` with what a device would have decided."""
    model = config.model
    if model.dtype == "auto":
        model = replace(model, dtype="float32" if config.train.device == "cpu" else "bfloat16")
    # none changes what is counted here, and what needs a GPU is refused on other devices
    plain: dict[str, Any] = {"attn": "sdpa", "linear": "torch", "rms_norm": "torch", "rope_fusion": False}
    backend = replace(model.backend, **plain, te_fp8=None)
    model = replace(model, float8="off", attn_implementation=None, backend=backend)
    return replace(config, model=model)


def _needs(config: "TrainConfig", rank: int, ranks: int) -> RankNeeds:
    with pretended(rank, ranks):
        mesh = build_mesh(config, torch.device("cpu"))
        numbered = build_parts(config, None, torch.device("meta"), mesh)
        parts, work = list(numbered.values()), work_of(config, mesh)
        trained = build_pipeline(numbered, config, mesh) if mesh.pp > 1 else parts[0]
        optimizer = build_optimizer(trained, config.optim, config.train.seed, mesh)
        parameters = [parameter for part in parts for parameter in part.parameters()]
        checkpointing = config.model.gradient_checkpointing
        state = (t for name, t in optimizer.state_tensors().items() if not name.startswith("step."))  # on the host
        return RankNeeds(
            rank=rank,
            stage=mesh.place["pp"],
            parameters=sum(local(p).nbytes for p in parameters),
            gradients=sum(gradient_bytes(p, accumulating=work.micro_batches > 1) for p in parameters),
            optimizer=sum(local(tensor).nbytes for tensor in state),
            gathered=sum(gathered_bytes(part, mesh.pp > 1 and not config.mesh.pp_reduce_each) for part in parts),
            activations=sum(activation_bytes(part, mesh, work, checkpointing) for part in parts),
            sent=traffic(numbered, mesh, work, checkpointing),
            elements=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
        )


def _notes(config: "TrainConfig", mesh: Mesh) -> list[str]:
    notes = []
    if config.train.batch_size % mesh.data:
        notes.append(
            f"train.batch_size={config.train.batch_size} is no multiple of the {mesh.data} groups of ranks with rows "
            "of their own: some compute rows that nothing is learned from"
        )
    if config.model.cpu_offload:
        notes.append("model.cpu_offload: parameters, gradients and optimizer are in host memory")
    positions = getattr(read_config(config.model.path, config.model.trust_remote_code), "max_position_embeddings", None)
    if positions is not None and config.data.max_length > positions:
        notes.append(f"data.max_length={config.data.max_length} is more than the model's {positions} positions")
    return notes


def _row(*cells: object) -> str:
    return "".join(f"{cell!s:>{8 if place < 2 else 15}}" for place, cell in enumerate(cells))
