"""Metrics on disk."""

import json
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_automodel.components.metrics import MetricsLog, peak_memory_gb, plot_loss
from nemo_automodel.components.metrics.log import read_metrics


def test_rows_go_to_jsonl_and_tensorboard(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log(1, loss=2.5)
    assert read_metrics(log.path) == [{"step": 1, "loss": 2.5}]  # readable while the run goes on
    log.log(2, loss=1.5, val_loss=1.75)
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
    plot_loss(log.path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_resuming_drops_rows_after_the_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(1, 5):
        log.log(step, loss=float(step))
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')  # the process was killed here
    log = MetricsLog(tmp_path, resume_step=2)
    log.log(3, loss=30.0)
    log.close()
    assert [json.loads(line)["loss"] for line in log.path.read_text().splitlines()] == [1.0, 2.0, 30.0]


def test_peak_memory_is_that_of_the_process() -> None:
    ballast = torch.ones(30_000_000)
    assert 0.12 < peak_memory_gb(torch.device("cpu")) < 30
    assert ballast.sum() == 30_000_000
