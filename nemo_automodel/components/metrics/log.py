"""Write metrics while a run goes on, and draw its loss curve."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Rows of numbers, one per logged step, into ``metrics.jsonl`` and TensorBoard.

    Args:
        folder: exists; gets ``metrics.jsonl`` and ``tensorboard/``.
        resume_step: rows of later steps, which an interrupted run wrote after its last checkpoint, are dropped.
    """

    def __init__(self, folder: Path, resume_step: int = 0):
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step] if resume_step else []
        self._file = self.path.open("w")
        for row in kept:
            self._write(row)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

    def log(self, step: int, **values: float) -> None:
        """Append one row."""
        self._write({"step": step, **values})
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._board.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that a killed process left unfinished is passed over."""
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise
    return rows


def plot_loss(metrics: Path, picture: Path) -> None:
    """Draw training and validation loss over steps from ``metrics.jsonl`` into a PNG."""
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o--")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss per token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far, in 10^9 bytes: allocated on a GPU, resident for the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
