"""What a verification found, for people, machines and tests."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nemo_automodel.verify.outcome import Outcome


@dataclass(frozen=True)
class Result:
    """One check's outcome.

    Attributes:
        group: heading.
        name: of the check.
        outcome: what it found.
        seconds: how long it took.
        trouble: the traceback of an exception that the implementation raised.
    """

    group: str
    name: str
    outcome: Outcome
    seconds: float
    trouble: str = ""

    @property
    def word(self) -> str:
        """``"pass"``, ``"FAIL"`` or, where the check does not apply, ``"n/a"``."""
        return {True: "pass", False: "FAIL", None: "n/a"}[self.outcome.passed]

    @property
    def measured(self) -> str:
        """The worst difference and its bound; empty where a check compares no numbers."""
        worst = self.outcome.worst
        if worst is None:
            return ""
        return f"{worst.error:.1e} of {worst.bound:.1e}" if worst.bound else "0, exact" if worst.passed else "not exact"


@dataclass(frozen=True, kw_only=True)
class Report:
    """All results of one target.

    Attributes:
        target: what the user named.
        implementation: full name of the class.
        reference: full name of the class that it was compared with.
        versions: of torch and transformers.
        device: where it ran.
        shrunk: how the tiny config differs from the given one.
        results: in the order of the checks.
        not_run: how many checks were left out since the model does not load.
    """

    target: str
    implementation: str
    reference: str
    versions: Mapping[str, str]
    device: str
    shrunk: tuple[str, ...]
    results: tuple[Result, ...]
    not_run: int = 0

    @property
    def passed(self) -> bool:
        """Whether no check failed, and some passed."""
        outcomes = [result.outcome.passed for result in self.results]
        return False not in outcomes and True in outcomes

    def failures(self) -> list[str]:
        """A line for each failed check."""
        return [f"{r.group}, {r.name}: {r.outcome.detail}" for r in self.results if r.outcome.passed is False]

    def summary(self) -> str:
        """Counts and time in one line."""
        counts = {word: sum(r.word == word for r in self.results) for word in ("pass", "FAIL", "n/a")}
        seconds = sum(result.seconds for result in self.results)
        verdict = "verified" if self.passed else "NOT verified"
        return (
            f"{verdict}: {counts['pass']} passed, {counts['FAIL']} failed, {counts['n/a']} not applicable, "
            f"in {seconds:.0f} s" + (f"; {self.not_run} not run, since the model does not load" if self.not_run else "")
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON-ready values; infinite differences as the text ``"inf"``."""
        return _plain(asdict(self)) | {"passed": self.passed}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
