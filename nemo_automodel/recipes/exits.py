"""Exit codes that a scheduler can act on: one table, and which errors mean which of them."""

import json
import os
import time
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_automodel.components.checkpoint import CheckpointError
from nemo_automodel.components.together import AnotherRankFailed


class ExitCode(IntEnum):
    """Of every ``automodel`` command, and of each rank of a training."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    TEMPORARY = 75  # EX_TEMPFAIL of sysexits.h
    INTERRUPTED = 130
    TERMINATED = 143


ADVICE = {
    ExitCode.DONE: "nothing is left to do",
    ExitCode.FAILED: "a defect, or (verify, new, bench) a difference was found: read the message",
    ExitCode.BAD_INPUT: "the input cannot be used, or the loss is not finite: no use in retrying unchanged",
    ExitCode.TEMPORARY: "a rank hung or was lost: the same command goes on from the last checkpoint",
    ExitCode.INTERRUPTED: "Ctrl-C, after saving: the same command goes on from there",
    ExitCode.TERMINATED: "SIGTERM, after saving: the same command goes on from there",
}
"""What is to be done, for a person or a scheduler; docs/cluster.md has the same table."""


class RankFailed(RuntimeError):
    """Another rank failed first: its own message, and the exit code that it ends with.

    Args:
        rank: that failed.
        message: its own.
        exit_code: of it, and so of all.
    """

    def __init__(self, rank: int, message: str, exit_code: int):
        super().__init__(f"rank {rank} failed: {message}")
        self.exit_code = ExitCode(exit_code)


def exit_code(error: BaseException) -> ExitCode:
    """What a process ends with that ``error`` stops; `FAILED` are defects, whose traceback is worth showing.

    An error may have an ``exit_code`` of its own; else its type decides.
    """
    given = getattr(error, "exit_code", None)
    if isinstance(given, ExitCode):
        return given
    if is_lost_rank(error):
        return ExitCode.TEMPORARY
    bad_input = (CheckpointError, ValueError, OSError, ImportError, torch.OutOfMemoryError)
    return ExitCode.BAD_INPUT if isinstance(error, bad_input) else ExitCode.FAILED


def is_lost_rank(error: BaseException) -> bool:
    """Whether ``error`` says no more than that another rank is gone: its cause is elsewhere."""
    return any(
        # gloo's errors have no type of their own
        isinstance(one, AnotherRankFailed | dist.DistError)
        or (isinstance(one, RuntimeError) and "gloo/transport" in str(one))
        for one in _chain(error)
    )


def record(message: str, code: ExitCode) -> None:
    """Leave ``message`` where the launcher looks for what a failed rank has to say; without one, nowhere."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(file).write_text(json.dumps({"message": message, "code": code, "timestamp": int(time.time())}))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
