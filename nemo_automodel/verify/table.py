"""The table on the terminal: a row for each check as it ends, and what failed in full below."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.status import Status
from rich.text import Text

from nemo_automodel.verify.check import Check
from nemo_automodel.verify.report import Report, Result
from nemo_automodel.verify.target import Target

_STYLES = {"pass": "green", "FAIL": "bold red", "n/a": "dim"}


class Table:
    """Prints rows as results come; on a terminal a line below them says what is running.

    Rows are printed once and never redrawn, so a table longer than the screen scrolls, and a log holds the same lines.

    Args:
        target: what is verified.
        console: where to print; default: stdout.
    """

    def __init__(self, target: Target, console: Console | None = None):
        self._console = console or Console(highlight=False)
        self._group = ""
        self._running = Status("", console=self._console) if self._console.is_terminal else None
        reference = target.reference_class
        self._title = Text(f"{target.model_class.__name__} against {reference.__module__}.{reference.__name__}")

    def __enter__(self) -> Self:
        if self._running is not None:
            self._running.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running is not None:
            self._running.stop()

    def start(self, check: Check) -> None:
        """Say that ``check`` is running; before the first, what is compared."""
        if self._title:
            self._print(self._title)
            self._title = Text()
        if self._running is not None:
            self._running.update(f"{check.group}: {check.name}")

    def add(self, result: Result) -> None:
        """The row of a check that has ended."""
        if result.group != self._group:
            self._group = result.group
            self._print(Text(f"\n{result.group}", "bold"))
        self._print(
            Text.assemble(
                f"  {result.name:<24} ",
                (f"{result.word:<4}", _STYLES[result.word]),
                f"  {result.measured:<18} {result.seconds:5.1f} s  ",
                (" ".join(result.outcome.detail.split()), "dim"),
            )
        )

    def close(self, report: Report) -> None:
        """What failed, in full; what was made smaller; the verdict."""
        failed = [result for result in report.results if result.outcome.passed is False]
        for result in failed:
            self._console.print(Text(f"\nFAIL {result.group}, {result.name}", _STYLES["FAIL"]))
            self._console.print(Text(f"{result.outcome.detail}\n{result.trouble}".rstrip()), soft_wrap=True)
        self._console.print()
        if len(failed) > 1 and (cause := next((each for each in failed if each.group == "modules"), None)):
            self._console.print(Text(f"begin with {cause.group}, {cause.name}: most of the others follow from it"))
        if report.shrunk:
            self._console.print(Text(f"on a smaller config: {', '.join(report.shrunk)}"), soft_wrap=True)
        self._console.print(Text(report.summary(), _STYLES["pass" if report.passed else "FAIL"]))

    def _print(self, row: Text) -> None:
        """A row is cut at the edge of a terminal, and whole elsewhere."""
        if self._console.is_terminal:
            self._console.print(row, no_wrap=True, overflow="ellipsis")
        else:
            self._console.print(row, soft_wrap=True)
