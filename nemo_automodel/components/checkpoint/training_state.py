"""Checkpoints of a running training: complete or invisible, newest first, resumed bit for bit."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_automodel.components.checkpoint.reading import CheckpointError
from nemo_automodel.components.checkpoint.writing import discard, publish_folder

_STATE, _TENSORS = "state.json", "training_state.safetensors"


@dataclass(frozen=True)
class TrainingCheckpoint:
    """One complete checkpoint: ``model/`` (what the model's own save wrote), tensors and JSON state.

    Attributes:
        folder: ``step-XXXXXXXX``.
        step: optimizer steps done.
        tensors: optimizer moments, master weights, random generators; by name.
        state: everything else, as JSON.
    """

    folder: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def model_folder(self) -> Path:
        """Where the model or adapter lies, in Hugging Face or peft format."""
        return self.folder / "model"


class TrainingCheckpoints:
    """The checkpoints of one run, ``step-XXXXXXXX`` folders below ``folder``.

    A folder appears by a rename once it is complete, so `latest` never finds half of one.

    Args:
        folder: created at the first save.
        keep_last: how many of the newest to keep; the best one is kept beside them.
    """

    def __init__(self, folder: str | Path, keep_last: int = 2):
        self.folder = Path(folder)
        self.keep_last = keep_last

    def save(
        self,
        step: int,
        *,
        write_model: Callable[[Path], None],
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        metric: float | None = None,
    ) -> Path:
        """Write a checkpoint and drop those that are neither among the newest nor the best.

        Args:
            step: optimizer steps done.
            write_model: writes the model (or adapter) into the folder it is given.
            tensors: optimizer moments and the like.
            state: JSON values: data position, configuration, counters.
            metric: validation loss, lower is better; the checkpoint with the lowest is kept.
        """

        def write(folder: Path) -> None:
            write_model(folder / "model")
            save_file(_apart(tensors), folder / _TENSORS)
            content = {"step": step, "metric": metric, "state": dict(state)}
            (folder / _STATE).write_text(json.dumps(content, indent=2) + "\n")

        target = publish_folder(self.folder / f"step-{step:08d}", write, replace=True)
        self._prune()
        return target

    def latest(self) -> TrainingCheckpoint | None:
        """The newest complete checkpoint, None when there is none.

        Raises:
            CheckpointError: it is complete by name but cannot be read (a damaged disk, an edited file).
        """
        folders = self._folders()
        return self._read(folders[-1]) if folders else None

    def _folders(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if (path / _STATE).is_file())

    def _read(self, folder: Path) -> TrainingCheckpoint:
        try:
            content = json.loads((folder / _STATE).read_text())
            tensors = load_file(folder / _TENSORS)
            return TrainingCheckpoint(folder, content["step"], tensors, content["state"])
        except Exception as error:
            raise CheckpointError(
                f"{folder} cannot be read ({type(error).__name__}: {error}); delete or mend it to resume from the "
                "one before"
            ) from error

    def _prune(self) -> None:
        folders = self._folders()
        metrics = {folder: _metric(folder) for folder in folders}
        best = min(folders, key=lambda folder: metrics[folder])
        for folder in folders[: -self.keep_last] if self.keep_last else []:
            if folder != best or metrics[best] == math.inf:
                discard(folder)
        for leftover in self.folder.glob(".step-*"):  # of a save or a deletion that was killed
            shutil.rmtree(leftover)


def _metric(folder: Path) -> float:
    try:
        metric = json.loads((folder / _STATE).read_text())["metric"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a damaged checkpoint is not the best one, and no reason to stop training
    return math.inf if metric is None or math.isnan(metric) else metric


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each in a storage of its own: safetensors refuses one that two names share."""
    storages: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if pointer in storages else tensor
        storages.add(pointer)
    return result


def random_state() -> dict[str, Tensor]:
    """The states of torch's random generators, CPU and every GPU, as byte tensors."""
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"rng.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_random_state(tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `random_state`; GPUs that are not here any more are passed over."""
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"rng.cuda.{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"rng.cuda.{i}"], i)
