"""The checks, in the order in which they run and are shown."""

from collections.abc import Sequence

from nemo_automodel.verify.check import Check
from nemo_automodel.verify.checks import adapters, checkpoint, end_to_end, modules, speed, weights
from nemo_automodel.verify.checks.meshes import mesh_check, parse_mesh
from nemo_automodel.verify.target import Target


def all_checks(target: Target, meshes: Sequence[str] = ()) -> list[Check]:
    """The checks of every model, those of ``target``'s own weights, and those of the meshes asked for.

    Raises:
        ValueError: a mesh that cannot be.
    """
    on_ranks = [mesh_check(parse_mesh(text, target.tiny)) for text in dict.fromkeys(meshes)]
    return [
        *weights.CHECKS,
        *modules.CHECKS,
        *end_to_end.CHECKS,
        *adapters.CHECKS,
        *checkpoint.real_weights(target),
        *on_ranks,
        *speed.CHECKS,
    ]
