"""One training step on several ranks of this machine, beside the reference's in one process."""

import importlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

from nemo_automodel.components.distributed import (
    ALONE,
    NotShared,
    Options,
    check_shares_sequences,
    parallelize,
    part_of,
)
from nemo_automodel.components.distributed import Mesh as Ranks
from nemo_automodel.components.models.common.tp_plan import NotCut, tp_plan_of
from nemo_automodel.components.placement import whole
from nemo_automodel.verify.check import Check
from nemo_automodel.verify.exact import Exact
from nemo_automodel.verify.names import stored_name
from nemo_automodel.verify.outcome import NotApplicable, Outcome, bitwise, formula, judge
from nemo_automodel.verify.ranks import run_ranks
from nemo_automodel.verify.shrink import LENGTH
from nemo_automodel.verify.subject import Subject
from nemo_automodel.verify.target import model_class_of

TIMEOUT = 180.0
"""Seconds for all ranks to start, load, step and save; ten are enough on an idle machine."""

LEARNING_RATE = 0.1
ROWS = 2
"""Of the batch, for each data-parallel rank."""

IGNORED = -100


@dataclass(frozen=True)
class Mesh:
    """How many ranks go along each axis.

    Attributes:
        text: as the user wrote it.
        replicate: whole copies of the model, whose gradients are averaged (HSDP).
        shard: ranks that share one copy (FSDP2).
        cp: ranks that share each sequence.
        tp: ranks that share each layer's computation.
    """

    text: str
    replicate: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def data(self) -> int:
        """Ranks with rows of their own."""
        return self.replicate * self.shard

    @property
    def size(self) -> int:
        """All ranks."""
        return self.data * self.cp * self.tp

    @property
    def axes(self) -> dict[str, int]:
        """Those with more than one rank, outermost first."""
        sizes = {"replicate": self.replicate, "shard": self.shard, "cp": self.cp, "tp": self.tp}
        return {name: size for name, size in sizes.items() if size > 1}

    def of_ranks(self) -> Ranks:
        """With this rank's place in it, or one process's."""
        sizes = {"dp_replicate": self.replicate, "dp_shard": self.shard, "cp": self.cp, "tp": self.tp}
        # as a training has it, wherever the sequence divides
        return Ranks(sizes, sequence_parallel=LENGTH % (self.cp * self.tp) == 0)


def parse_mesh(text: str, config: PreTrainedConfig) -> Mesh:
    """``"fsdp=2"``, ``"tp=2"``, ``"cp=2"``, ``"fsdp=2,tp=2"`` or ``"hsdp=2x2"``, for a model of ``config``.

    Raises:
        ValueError: another word or size, or heads that do not divide over ``tp``.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis == "pp":
            raise ValueError(
                f"--mesh {text}: stages are not checked here, a training's mesh.pp has them; take cp or tp"
            )
        wanted = r"(\d+)x(\d+)" if axis == "hsdp" else r"(\d+)"
        found = re.fullmatch(wanted, size)
        if axis not in ("fsdp", "hsdp", "cp", "tp") or found is None:
            raise ValueError(
                f"--mesh {text}: {part!r} is none of fsdp=2, hsdp=2x2 (copies x ranks of each), cp=2, tp=2"
            )
        names = {"fsdp": ["shard"], "hsdp": ["replicate", "shard"]}.get(axis, [axis])
        if sizes.keys() & names:
            raise ValueError(f"--mesh {text}: {axis} comes on top of another one; give fsdp or hsdp, cp and tp once")
        sizes |= dict(zip(names, map(int, found.groups()), strict=True))
    if min(sizes.values()) < 2:
        raise ValueError(f"--mesh {text}: two ranks at least, along each axis")
    mesh = Mesh(text, **sizes)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    left = f" with tp={mesh.tp}" if mesh.tp > 1 else ""
    for axis, count, what in (
        ("tp", heads, "KV heads"),
        ("tp", config.intermediate_size, "rows of the MLP"),
        ("cp", heads // mesh.tp, f"KV heads{left}"),
        ("cp", LENGTH, "tokens"),
    ):
        if count % (size := getattr(mesh, axis)):
            raise ValueError(
                f"{axis}={size} but {count} {what}: {axis} must divide them (in the small model that is checked)"
            )
    return mesh


def mesh_check(mesh: Mesh) -> Check:
    """The check of one mesh."""
    return Check("meshes", mesh.text, partial(same_step, mesh=mesh))


def same_step(subject: Subject, mesh: Mesh) -> Outcome:
    """Logits, loss, gradients and the parameters after a step of SGD in float64, on every rank; and a saved model."""
    if mesh.tp > 1:
        try:
            tp_plan_of(subject.ours())
        except NotCut as reason:
            raise NotApplicable(f"no tensor parallelism: {reason}") from reason
    if mesh.cp > 1:
        try:
            check_shares_sequences(subject.ours())
        except NotShared as reason:
            raise NotApplicable(f"no context parallelism: {reason}") from reason
    folder = subject.scratch / mesh.text
    folder.mkdir()
    ids = subject.tokens(ROWS * mesh.data).cpu()
    labels = ids.clone()
    for row, label in enumerate(labels):  # ranks with unlike numbers of tokens to learn from
        label[: 7 * row % LENGTH] = IGNORED
    save_file({"ids": ids, "labels": labels}, folder / "batch.safetensors")
    job = Job(mesh, ClassByName.of(subject.target.model_class), subject.checkpoint, folder)
    run_ranks(mesh.size, _on_rank, job, timeout=TIMEOUT)

    with Exact():
        expected = _step(subject.reference(torch.float64).cpu(), ids, labels, _tokens(labels))
    differences, loss = [], torch.zeros((), dtype=torch.float64)
    for rank in range(mesh.size):
        actual = load_file(folder / f"rank{rank}.safetensors")
        if actual.keys() != expected.keys():
            return Outcome(False, f"tensors that are on one side only: {sorted(actual.keys() ^ expected.keys())[:4]}")
        loss += actual.pop("loss") / mesh.tp
        for name, value in actual.items():
            wanted = expected[name]
            if name == "logits":
                wanted = part_of(wanted[_rows(rank, mesh)], rank // mesh.tp % mesh.cp, mesh.cp)
            differences.append(formula(f"rank {rank}: {name}", value, wanted))
    differences.append(formula("loss", loss, expected["loss"]))
    saved, stored = (load_file(each / "model.safetensors") for each in (folder / "saved", subject.checkpoint))
    if saved.keys() != stored.keys():
        return Outcome(False, f"saved tensors that came or went: {sorted(saved.keys() ^ stored.keys())[:4]}")
    differences += [bitwise(f"saved {key}", saved[key], stored[key]) for key in stored]
    return judge(differences, f"{mesh.size} ranks: loss, logits, gradients, a step of SGD, and what they save")


@dataclass(frozen=True)
class ClassByName:
    """An implementation for another process: a class out of a ``model.py`` cannot be pickled."""

    module: str
    file: str
    name: str

    @classmethod
    def of(cls, model_class: Any) -> "ClassByName":
        """Names of ``model_class``."""
        module = sys.modules[model_class.__module__]
        return cls(module.__name__, module.__file__ or "", model_class.__name__)

    def find(self) -> Any:
        """The class."""
        try:
            return getattr(importlib.import_module(self.module), self.name)
        except ModuleNotFoundError as error:
            if not f"{self.module}.".startswith(f"{error.name}."):  # it is there, and lacks a module itself
                raise
            return model_class_of(Path(self.file))


@dataclass(frozen=True)
class Job:
    """What the ranks do.

    Attributes:
        mesh: of all ranks.
        model_class: the implementation.
        checkpoint: what they load.
        folder: has the batch; the results go there.
    """

    mesh: Mesh
    model_class: ClassByName
    checkpoint: Path
    folder: Path

    def load(self, dtype: torch.dtype) -> Any:
        """This rank's shards of the model."""
        ranks = self.mesh.of_ranks()

        def shard(model: Any) -> None:
            parallelize(model, ranks, Options(tp_plan=tp_plan_of(model) if ranks.tp > 1 else {}))

        return self.model_class.find().from_pretrained(
            self.checkpoint, dtype=dtype, attn_implementation="eager", prepare=shard
        )


def _on_rank(job: Job) -> None:
    job.load(torch.float32).save_pretrained(job.folder / "saved")
    batch, rows = load_file(job.folder / "batch.safetensors"), _rows(dist.get_rank(), job.mesh)
    tokens = _tokens(batch["labels"])
    with Exact():
        tensors = _step(job.load(torch.float64), batch["ids"][rows], batch["labels"][rows], tokens, job.mesh.of_ranks())
    save_file(tensors, job.folder / f"rank{dist.get_rank()}.safetensors")


def _rows(rank: int, mesh: Mesh) -> slice:
    """Of the batch, for one rank."""
    first = rank // (mesh.cp * mesh.tp) * ROWS
    return slice(first, first + ROWS)


def _tokens(labels: Tensor) -> int:
    """That are learnt from."""
    return int((labels[:, 1:] != IGNORED).sum())


def _step(model: Any, ids: Tensor, labels: Tensor, tokens: int, mesh: Ranks = ALONE) -> dict[str, Tensor]:
    """Logits, this rank's share of the loss, and each parameter's gradient and value after a step of SGD.

    Args:
        model: this rank's part of one, or whole.
        ids: ``[rows, S]``.
        labels: ``[rows, S]``.
        tokens: of the rows of all ranks, by which the sum over these rows' tokens is divided.
        mesh: of all ranks.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    ids, targets = (mesh.part(x) for x in (ids, targets))
    logits = model(input_ids=ids, use_cache=False).logits
    summed = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    loss = summed / tokens
    (loss * mesh.averaged).backward()
    parameters = dict(model.named_parameters())
    if absent := [name for name, parameter in parameters.items() if parameter.grad is None]:
        raise ValueError(f"{absent[0]} takes no part in the loss: it has no gradient")
    gradients = _whole(model, {name: parameter.grad for name, parameter in parameters.items()})
    torch.optim.SGD(parameters.values(), lr=LEARNING_RATE, foreach=False).step()
    stepped = _whole(model, parameters)
    return {
        "logits": logits.detach().contiguous(),
        "loss": loss.detach(),
        **{f"gradient of {name}": value for name, value in gradients.items()},
        **{f"{name} after a step": value for name, value in stepped.items()},
    }


def _whole(model: Any, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Gathered, under the checkpoint's names, and with memory of their own."""
    gathered = {name: whole(tensor) for name, tensor in tensors.items()}
    if hasattr(model, "state_dict_adapter"):
        gathered = model.state_dict_adapter.to_hf(gathered)
    return {
        stored_name(model, name): tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in gathered.items()
    }
