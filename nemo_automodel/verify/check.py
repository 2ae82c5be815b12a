"""One row of the table that ``automodel verify`` shows."""

from collections.abc import Callable
from dataclasses import dataclass

from nemo_automodel.verify.outcome import Outcome
from nemo_automodel.verify.subject import Subject


@dataclass(frozen=True)
class Check:
    """A check and its place in the table.

    Attributes:
        group: heading that it stands under.
        name: what is checked.
        run: does it; raises `NotApplicable` where there is nothing to check.
        slow: left out by ``--quick``.
    """

    group: str
    name: str
    run: Callable[[Subject], Outcome]
    slow: bool = False
