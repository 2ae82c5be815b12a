"""Checkpoints of a running training: complete or invisible, newest first, resumed bit for bit, on any mesh.

`torch.distributed.checkpoint` writes them, in its safetensors storage: every rank its own shards, whatever the
placements, and a run resumes on other ranks. No pickle is written or read.
"""

import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    _gen_file_name,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.futures import Future as TorchFuture

from nemo_automodel.components.checkpoint.reading import CheckpointError
from nemo_automodel.components.checkpoint.writing import discard, publish_folder, sync_path
from nemo_automodel.components.together import Together

logger = logging.getLogger(__name__)

# that one process is alone is no mishap; from the background thread, so no block here could catch it
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

_STATE = "state.json"
_CPU = torch.device("cpu")
_FILE_BYTES = 2**30


@dataclass(frozen=True)
class TrainingCheckpoint:
    """One complete checkpoint.

    Attributes:
        folder: ``step-XXXXXXXX``; holds the ranks' safetensors shards, ``state.json`` and what was written beside them.
        step: optimizer steps done.
        state: everything that is no tensor, as JSON.
    """

    folder: Path
    step: int
    state: dict[str, Any]

    def load(self, tensors: Mapping[str, Tensor], alone: bool = False) -> None:
        """Fill ``tensors`` in place: plain ones, or DTensors of any placements (each rank reads its own shards).

        Args:
            tensors: by name; pipeline stages have each their own.
            alone: this rank loads and the others do not.

        Raises:
            CheckpointError: a tensor is not in the checkpoint, has another shape there, or cannot be read.
        """
        with _torch_errors(f"{self.folder} cannot be loaded (delete or mend it to resume from the one before)"):
            dcp.load(
                {name: _one_dim(tensor) for name, tensor in tensors.items()},
                storage_reader=HuggingFaceStorageReader(str(self.folder)),
                no_dist=alone,
            )


class TrainingCheckpoints:
    """The checkpoints of one run, ``step-XXXXXXXX`` folders below ``folder``.

    A folder appears by a rename once every rank has written its part, so `latest` never finds half of one. Every
    method is called by all ranks; they share the file system.

    Args:
        folder: created at the first save.
        keep_last: how many of the newest to keep; the best one is kept beside them.
        asynchronous: write in the background, from a copy in host memory, while training goes on. One save is under
            way at a time; `wait` (or the next save) raises what went wrong. On a GPU machine the copy's memory is
            pinned and kept from save to save: the first one waits for the system to give it out, the others do not.
    """

    def __init__(self, folder: str | Path, keep_last: int = 2, asynchronous: bool = False):
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.asynchronous = asynchronous
        self._pending: Future[Any] | None = None
        self._together = Together()
        # of its own: the background's messages must not meet those of the training on the way
        self._group = dist.new_group(backend="gloo") if self._together.size > 1 else None
        pinned = asynchronous and torch.cuda.is_available()
        self._stager = BlockingAsyncStager(cache_staged_state_dict=True) if pinned else None

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        write_files: Callable[[Path], None] | None = None,
        metric: float | None = None,
    ) -> Path:
        """Write a checkpoint and drop those that are neither among the newest nor the best.

        Args:
            step: optimizer steps done.
            tensors: weights, optimizer moments and the like, plain (then the same on every rank) or DTensor; each in
                memory of its own.
            state: JSON values: data position, configuration, counters.
            write_files: writes further files (a config, a tokenizer) into the folder it is given; on one rank.
            metric: validation loss, lower is better; the checkpoint with the lowest is kept.
        """
        self.wait()
        target = self.folder / f"step-{step:08d}"
        content = {"step": step, "metric": metric, "state": dict(state)}
        shards = self.folder / f".{target.name}.shards"

        def prepare() -> None:
            shutil.rmtree(shards, ignore_errors=True)
            shards.mkdir(parents=True)
            if write_files is not None:
                write_files(shards)

        def publish() -> None:
            files = {str(f.relative_to(shards)): f.stat().st_size for f in sorted(shards.rglob("*")) if f.is_file()}
            (shards / _STATE).write_text(json.dumps(content | {"files": files}, indent=2) + "\n")
            publish_folder(target, lambda aside: _move_all(shards, aside), replace=True)
            for folder in self._folders():
                if folder.name > target.name:  # damaged, since training went on from before it
                    discard(folder)
            self._prune()

        self._together.run(prepare, everywhere=False)
        values = {name: _one_dim(tensor.detach()).contiguous() for name, tensor in tensors.items()}
        writer = _Writer(shards, publish, _files(values, self._together.size))
        options: dict[str, Any] = {"storage_writer": writer, "process_group": self._group}
        with _torch_errors(f"{target} cannot be saved"):
            if self.asynchronous:
                self._pending = cast(Future[Any], dcp.async_save(values, async_stager=self._stager, **options))
            else:
                dcp.save(values, **options)
        return target

    def wait(self) -> None:
        """Return when no save is under way.

        Raises:
            CheckpointError: the last one failed, on some rank.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with _torch_errors(f"the last checkpoint for {self.folder} could not be saved"):
                pending.result()

    def latest(self) -> TrainingCheckpoint | None:
        """The newest checkpoint that is whole, None when there is no checkpoint at all.

        One whose files are missing or cut is passed over, with a warning.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
        """
        problems = []
        for folder in reversed(self._folders()):
            try:
                found = _read(folder)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                logger.warning("%s: going back to %s", problem, folder)
            return found
        if problems:
            raise CheckpointError("; ".join(problems) + ": mend one, or delete them all to start over")
        return None

    def find(self, name: str) -> TrainingCheckpoint | None:
        """The checkpoint in the folder of that name, None when there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        return _read(self.folder / name) if (self.folder / name / _STATE).is_file() else None

    def _folders(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def _prune(self) -> None:
        folders = self._folders()
        metrics = {folder: _metric(folder) for folder in folders}
        best = min(folders, key=lambda folder: metrics[folder])
        for folder in folders[: -self.keep_last] if self.keep_last else []:
            if folder != best or metrics[best] == math.inf:
                discard(folder)
        for leftover in self.folder.glob(".step-*"):  # of a save or a deletion that was killed
            shutil.rmtree(leftover)


class _Writer(HuggingFaceStorageWriter):
    """Each rank writes its shards; when all have, the leading one publishes them.

    torch's own ``write_data`` makes the bytes of a whole file in Python first, which doubles it in memory and holds
    the interpreter for a second per gigabyte: training stands still meanwhile. Here safetensors writes the file.
    """

    def __init__(self, folder: Path, publish: Callable[[], None], files: dict[str, int]):
        super().__init__(str(folder), fqn_to_index_mapping=files, save_distributed=True)
        self._publish, self._files = publish, files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        files = self._files  # not the plan's, which the leading rank made of its own tensors
        for index, items in self._split_by_storage_plan(files, plan.items).items():
            tensors = {item.index.fqn: cast(Tensor, planner.resolve_data(item)).cpu() for item in items}
            offsets = {item.index.fqn: cast(Any, item.tensor_data).chunk.offsets for item in items}
            chunks = {name: {"saved_offsets": at} for name, at in offsets.items()}
            file_name = _gen_file_name(index, max(files.values()), plan.storage_data["shard_index"])
            file = Path(self.path) / file_name
            metadata = {CUSTOM_METADATA_KEY: json.dumps(chunks), DCP_VERSION_KEY: str(HF_DCP_VERSION)}
            save_file(tensors, file, metadata | {FORMAT_KEY: FORMAT_VALUE})
            sync_path(file)
        written: TorchFuture[list[Any]] = TorchFuture()
        written.set_result([])  # what `finish` would make an index of
        return written

    def finish(self, metadata: Any, results: Any) -> None:
        self._publish()


def _files(tensors: Mapping[str, Tensor], ranks: int) -> dict[str, int]:
    """Which of a rank's files, from 1, takes each tensor; a GPU's tensors are in host memory a file at a time."""
    files, size = {}, 0
    for name, tensor in tensors.items():
        size += tensor.numel() * tensor.itemsize // ranks
        files[name] = 1 + size // _FILE_BYTES
    return files


def _read(folder: Path) -> TrainingCheckpoint:
    try:
        content = json.loads((folder / _STATE).read_text())
        for name, size in content["files"].items():
            if not (folder / name).is_file():
                raise ValueError(f"{name} is missing")
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{name} has {(folder / name).stat().st_size} bytes, not {size}")
        return TrainingCheckpoint(folder, content["step"], content["state"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is damaged ({error})") from error


def _metric(folder: Path) -> float:
    try:
        metric = json.loads((folder / _STATE).read_text())["metric"]
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf  # a damaged checkpoint is not the best one, and no reason to stop training
    return math.inf if metric is None or math.isnan(metric) else metric


def _move_all(source: Path, target: Path) -> None:
    for path in source.iterdir():
        path.rename(target / path.name)
    source.rmdir()


def _one_dim(tensor: Tensor) -> Tensor:
    """A view with at least one dim: torch's safetensors storage cannot slice a scalar."""
    return tensor.view(1) if tensor.ndim == 0 else tensor


@contextmanager
def _torch_errors(what: str) -> Iterator[None]:
    """torch's own exception, which is no `Exception`, as a CheckpointError."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{what}: rank {rank}: {type(cause).__name__}: {cause}") from error


def random_state(device: torch.device = _CPU) -> dict[str, Tensor]:
    """The states of torch's random generators, the CPU's and a GPU ``device``'s: byte tensors ``[ranks, bytes]``."""
    states = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    together = Together()
    return {name: together.gather(state) for name, state in states.items()}


def restore_random_state(tensors: Mapping[str, Tensor], device: torch.device = _CPU) -> None:
    """The inverse of `random_state`, on as many ranks and the same kind of device."""
    rank = Together().rank
    # copies: set_rng_state does not look at a view's offset as it should, and crashes
    torch.set_rng_state(tensors["rng.cpu"][rank].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"][rank].clone(), device)
