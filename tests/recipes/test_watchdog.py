"""A rank that hangs is named, with its step and phase, within the timeout; the process ends with a code of its own."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_automodel.config import load_config
from nemo_automodel.recipes import train as recipe
from nemo_automodel.recipes import watchdog
from nemo_automodel.recipes.exits import ExitCode, RankFailed, exit_code
from tests.distributed.ranks import run_ranks
from tests.recipes.conftest import checkpoint, overrides, rows  # noqa: F401  (fixtures)

Overrides = Callable[..., list[str]]
NOW = 1000.0


@pytest.mark.parametrize(
    ("reports", "message", "blamed"),
    [
        (
            {3: (17, "data")},
            "rank 3 is still in step 17 (data); ranks 0-2, 4-7 wait in step 17 (forward/backward)",
            [3],
        ),
        ({}, "ranks 0-7 are still in step 17 (forward/backward)", list(range(8))),
        (
            {0: (16, "checkpoint"), 5: (16, "optimizer"), 6: (16, "optimizer")},
            "ranks 5-6 are still in step 16 (optimizer); rank 0 waits in step 16 (checkpoint); "
            "ranks 1-4, 7 wait in step 17 (forward/backward)",
            [5, 6],
        ),
        (
            {2: (17, "data", NOW - 50)},
            "rank 2 no longer reports, and was last in step 17 (data); ranks 0-1, 3-7 wait in step 17 (forward",
            [2],
        ),
        ({1: None, 4: (0, "setup")}, "rank 1 no longer reports; rank 4 waits in setup; ranks 0, 2-3, 5-7 wait", [1]),
    ],
)
def test_diagnosis(reports: dict[int, Any], message: str, blamed: list[int]) -> None:
    all_reports: list[Any] = [(17, "forward/backward", NOW)] * 8
    for rank, report in reports.items():
        all_reports[rank] = report and (*report, *[NOW][len(report) - 2 :])
    text, ranks = watchdog.diagnose(60.4, all_reports, silence=20)
    assert text.startswith(f"no progress for 60 s: {message}")
    assert ranks == blamed


def _hang(words: list[str], folder: Path, step_to_hang: int) -> None:
    import torch.distributed as dist

    rank = dist.get_rank()
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"error-{rank}")
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_CREAT | os.O_WRONLY), 2)
    batches = recipe.BatchStream.__next__

    def sleepy(self: Any) -> Any:
        if rank == 1 and watchdog._place.step == step_to_hang:
            time.sleep(1000)
        return batches(self)

    recipe.BatchStream.__next__ = sleepy  # type: ignore[method-assign]
    recipe.train(load_config(recipe.TrainConfig, None, words), say=lambda line: None)


@pytest.mark.ranks
def test_all_ranks_name_the_one_that_hangs(overrides: Overrides, tmp_path: Path) -> None:  # noqa: F811
    """The other one hangs in a collective then, and both end by themselves."""
    words = overrides(train__device="cpu", train__hang_timeout="2")
    started = time.monotonic()
    with pytest.raises(AssertionError, match="died"):
        run_ranks(2, _hang, words, tmp_path, 3)
    assert time.monotonic() - started < 100
    said = "rank 1 is still in step 3 (data); rank 0 waits in step 3 (forward/backward)"
    for rank in (0, 1):
        assert said in (tmp_path / f"stderr-{rank}").read_text()
    assert said in json.loads((tmp_path / "error-1").read_text())["message"]
    assert "in sleepy" in (tmp_path / "stderr-1").read_text()


def _fail(words: list[str]) -> tuple[str, int]:
    import torch.distributed as dist

    step = recipe.Run.step

    def failing(self: Any, number: int) -> None:
        if dist.get_rank() == 1 and number == 2:
            raise ValueError("a row that this rank cannot use")
        step(self, number)

    recipe.Run.step = failing  # type: ignore[method-assign]
    try:
        recipe.train(load_config(recipe.TrainConfig, None, words), say=lambda line: None)
    except (ValueError, RankFailed) as error:
        dist.destroy_process_group()
        return str(error), exit_code(error)
    raise AssertionError("nothing was raised")


@pytest.mark.ranks
def test_a_rank_that_is_left_alone_says_what_the_other_one_said(overrides: Overrides) -> None:  # noqa: F811
    """And ends with the same code, so that a scheduler does not retry what is of no use."""
    said = "a row that this rank cannot use"
    alone, failed = run_ranks(2, _fail, overrides(train__device="cpu"))
    assert alone == (f"rank 1 failed: {said}", ExitCode.BAD_INPUT)
    assert failed == (said, ExitCode.BAD_INPUT)
