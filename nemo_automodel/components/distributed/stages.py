"""Which layers a pipeline stage has, which stages a rank has, and a model without the rest."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import nn

from nemo_automodel.components.elsewhere import Elsewhere

ScheduleName = Literal["GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"]

SINGLE: Sequence[str] = ("GPipe", "1F1B")
"""Schedules of one stage for each rank; the others have several, ZBV exactly two."""

ZERO_BUBBLE: Sequence[str] = ("InterleavedZeroBubble", "ZBVZeroBubble")
"""Schedules that compute the gradients of inputs and of weights apart."""


def check_schedule(schedule: str, virtual_stages: int | None) -> None:
    """Refuse a schedule that there is not, or with as many stages for each rank.

    Raises:
        ValueError: naming both, and what would do.
    """
    if schedule not in get_args(ScheduleName):
        raise ValueError(f"pp_schedule={schedule!r} is none; there are {', '.join(get_args(ScheduleName))}")
    if virtual_stages is None:
        return
    least = 1 if schedule in SINGLE else 2
    most = virtual_stages if "Interleaved" in schedule else least
    if not least <= virtual_stages <= most:
        wanted = f"{least} or more" if "Interleaved" in schedule else str(least)
        raise ValueError(f"pp_virtual_stages={virtual_stages}: {schedule} has {wanted} for each rank")


def stages_of(rank: int, ranks: int, schedule: str, virtual_stages: int | None = None) -> list[int]:
    """Numbers of the stages that ``rank`` of a pipeline's ``ranks`` has, in ascending order."""
    if schedule == "ZBVZeroBubble":  # down the ranks and up again: the first has the first and the last
        return [rank, 2 * ranks - 1 - rank]
    return [rank + ranks * number for number in range(virtual_stages or (1 if schedule in SINGLE else 2))]


def takes_micro_batches(schedule: str, ranks: int, count: int) -> bool:
    """Whether ``schedule``, over a pipeline's ``ranks``, can do with ``count`` micro-batches a step."""
    if "Interleaved" in schedule:  # rounds of equally many
        return count % max(1, count // ranks) == 0
    return schedule != "1F1B" or count >= ranks


def stage_layers(num_layers: int, stages: int, first_cost: float, last_cost: float) -> list[int]:
    """How many layers each stage has, so that the costliest stage costs as little as can be.

    Args:
        num_layers: of the model.
        stages: how many; each gets a layer at least.
        first_cost: of what the first stage has beside its layers, where a layer costs one.
        last_cost: of what the last has.

    Raises:
        ValueError: more stages than layers.
    """
    if num_layers < stages:
        raise ValueError(f"mesh: {stages} pipeline stages of {num_layers} layers: some would have none")
    layers, costs = [1] * stages, [1.0] * stages
    costs[0] += first_cost
    costs[-1] += last_cost
    for _ in range(num_layers - stages):
        # among equals the later one: earlier stages keep the activations of more micro-batches
        least = min(range(stages), key=lambda stage: (costs[stage], -stage))
        layers[least] += 1
        costs[least] += 1
    return layers


def keep_stage(model: Any, stage: int, stages: int) -> None:
    """Leave in ``model`` what its ``_pp_plan`` gives to one stage; `Elsewhere` takes the places of the rest.

    The first stage has what comes before the layers, the last what comes after them. Names stay as they were. Of tied
    parameters that come to be in two stages, ``model.split_ties`` tells: name here -> the name of both in checkpoints.

    Args:
        model: with a ``_pp_plan`` that names its modules, of which one is the list of layers; changed in place.
        stage: the stage's number.
        stages: how many there are.

    Raises:
        ValueError: a model without a plan, a plan that does not fit it, or more stages than layers.
    """
    plan, modules = getattr(model, "_pp_plan", None) or {}, dict(model.named_modules())
    kind = type(model).__name__
    if unknown := [name for name in plan if name not in modules]:
        raise ValueError(f"the pipeline plan of {kind} does not fit it: {unknown[0]} matches no module")
    names = [name for name in modules if name in plan]
    lists = [number for number, name in enumerate(names) if isinstance(modules[name], nn.ModuleList)]
    if len(lists) != 1:
        raise ValueError(
            f"mesh: {kind} has no _pp_plan with one list of layers, so it cannot be cut into stages; leave pp at 1"
        )
    for name, _ in model.named_parameters():
        if not any(name.startswith(f"{planned}.") for planned in names):
            raise ValueError(f"the pipeline plan of {kind} does not fit it: {name} is in no module that it names")
    before, path, after = names[: lists[0]], names[lists[0]], names[lists[0] + 1 :]
    layers = modules[path]
    assert isinstance(layers, nn.ModuleList)
    each = sum(map(_cost, layers)) / len(layers)
    first, last = (sum(_cost(modules[name]) for name in part) / each for part in (before, after))
    counts = stage_layers(len(layers), stages, first, last)
    start = sum(counts[:stage])
    gone = [f"{path}.{n}" for n in range(len(layers)) if not start <= n < start + counts[stage]]
    gone += [] if stage == 0 else before
    gone += [] if stage == stages - 1 else after
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in gone:
        model.set_submodule(name, Elsewhere())
    _note_split_ties(model, parameters)


def _note_split_ties(model: Any, before: Mapping[str, nn.Parameter]) -> None:
    """Of parameters that were one and the same, ``model.split_ties`` has those left -> the first name of them all."""
    names: dict[int, list[str]] = {}
    for name, parameter in before.items():
        names.setdefault(id(parameter), []).append(name)
    left = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    split = [same for same in names.values() if len(same) > 1 and not set(same) <= left]
    model.split_ties = {name: same[0] for same in split for name in same if name in left}
    apart = {name for same in split for name in same}
    for module in model.modules():  # transformers would look for them here
        tied = getattr(module, "all_tied_weights_keys", None) or {}
        for target in [target for target, source in tied.items() if {target, source} & apart]:
            del tied[target]


def _cost(module: nn.Module) -> int:
    """Multiplications for a token: those of its linear layers. An embedding is looked up."""
    return sum(each.weight.numel() for each in module.modules() if isinstance(each, nn.Linear))
