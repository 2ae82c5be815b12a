"""Many problems in one error. A leaf."""

from collections.abc import Sequence

SHOWN = 8


def listed(problems: Sequence[str]) -> str:
    """The first `SHOWN` problems, a line each, and how many more there are."""
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n  ".join([*problems[:SHOWN], *more])
