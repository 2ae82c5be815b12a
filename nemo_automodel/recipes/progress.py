"""A progress bar on a terminal; plain lines, now and then, elsewhere."""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Shows step, loss, tokens/s, memory and time left of a training.

    Args:
        done: steps done before this session.
        total: steps in all.
        say: prints a line where the output is no terminal.
    """

    def __init__(self, done: int, total: int, say: Callable[[str], None]):
        self._total, self._say, self._done = total, say, done
        self._started = self._last_line = time.monotonic()
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self._bar = RichProgress(*columns, TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task("training", total=total, completed=done, text="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, row: Mapping[str, float]) -> None:
        """Show what optimizer step ``step`` came to."""
        text = f"loss {row['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s, {row['memory_gb']:.1f} GB"
        if "val_loss" in row:
            text += f", validation {row['val_loss']:.4f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if (
            now - self._last_line >= _SECONDS_BETWEEN_LINES
            or step in (self._done + 1, self._total)
            or "val_loss" in row
        ):
            self._last_line = now
            left = (now - self._started) / (step - self._done) * (self._total - step)
            self._say(f"step {step}/{self._total}: {text}, {left / 60:.1f} min left")
