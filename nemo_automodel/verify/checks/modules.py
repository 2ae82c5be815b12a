"""Module by module in float64, where right formulas agree to thirteen digits and wrong ones do not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nemo_automodel.components.peft import layout_of
from nemo_automodel.verify.check import Check
from nemo_automodel.verify.diagnosis import explain
from nemo_automodel.verify.exact import Exact
from nemo_automodel.verify.outcome import Difference, Outcome, formula, judge
from nemo_automodel.verify.shrink import LENGTH, shrunk
from nemo_automodel.verify.subject import Subject
from nemo_automodel.verify.trace import Point, Trace, calls_of, first_tensor, trace


def layer_by_layer(subject: Subject) -> Outcome:
    """Names the first place in the forward pass where the two part, and what the difference looks like."""
    return compare_modules(subject, input_ids=subject.tokens())


def positions(subject: Subject) -> Outcome:
    """The same at positions that start late, and differ between rows."""
    ids = subject.tokens(length=12)
    late = torch.stack([torch.arange(5, 17), torch.arange(11, 23)]).to(subject.device)
    return compare_modules(subject, input_ids=ids, position_ids=late)


@dataclass(frozen=True)
class Pair:
    """Both models in float64, and what went through each."""

    reference: Any
    ours: Any
    expected: Trace
    actual: Trace
    inputs: dict[str, Any]

    @classmethod
    def run(cls, subject: Subject, inputs: dict[str, Any]) -> "Pair":
        """Load both and run them on ``inputs``."""
        with Exact():
            reference, ours = subject.reference(torch.float64), subject.ours(torch.float64)
            expected, actual = (trace(model, use_cache=False, **inputs) for model in (reference, ours))
        return cls(reference, ours, expected, actual, inputs)


def compare_modules(subject: Subject, **inputs: Any) -> Outcome:
    """Run both in float64 on ``inputs`` and compare all that their modules take and give."""
    return _compare(subject, Pair.run(subject, inputs))


def _compare(subject: Subject, pair: Pair) -> Outcome:
    expected, actual = pair.expected, pair.actual
    with Exact():
        shared = [point for point in expected if point in actual]
        found = {point: formula(str(point), actual[point], expected[point]) for point in shared}
        inner = {point for point, trunk in _trunk_after(shared) if found[trunk].passed and not found[point].passed}
        wrong = next((point for point in shared if not found[point].passed and point not in inner), None)
        differences = tuple(found[point] for point in shared if point not in inner)
        if wrong is not None:
            first = found[wrong]
            looks = explain(wrong, expected, actual, pair.reference, pair.ours, pair.inputs)
            where = str(wrong) if wrong.module else "the logits"
            return Outcome(
                False,
                f"the first to part is {where}, by {first.error:.2g} ({first.bound:.2g} allowed): {looks}",
                differences,
            )
    absent = sorted({point.module for point in expected if point.side == "output" and point not in actual})
    detail = f"{len(differences)} inputs and outputs of modules agree in float64"
    if absent:
        detail += f"; not compared, since not there under that name: {', '.join(absent[:4])}"
    if inner:
        detail += f"; arranged in another way, to the same effect: {', '.join(sorted({p.module for p in inner})[:4])}"
    if Point("", "output") not in shared or len(differences) < 2 * subject.config.num_hidden_layers:
        return Outcome(False, f"too few modules have the reference's names to compare: {detail}", differences)
    return Outcome(True, detail, differences)


def _trunk_after(points: list[Point]) -> Iterator[tuple[Point, Point]]:
    """Each point with the next one on the trunk, where both must agree however the work between is arranged.

    An implementation may permute rows, or scale at another place, as long as what attention and MLP hand on, and what
    runs from layer to layer, is the reference's.
    """
    trunk = attended = points[-1]
    for point in reversed(points):
        leaf = point.module.rpartition(".")[2]
        if leaf.isdigit() or not point.module or (point.side == "input" and leaf in ("o_proj", "down_proj", "lm_head")):
            trunk = point
            attended = point if leaf == "o_proj" else attended
        yield point, attended if point.side in ("cos", "sin") else trunk


MARGIN_IN_BF16 = 1.1
"""How far from float64 a module may be in bf16, in units of the reference's module on the same input.

Root mean squares over a thousand elements and more scatter by a few percent between right orders of rounding; one
rounding too many in a norm, or cos and sin rounded first, costs a third and more.
"""


def rounding_by_module(subject: Subject) -> Outcome:
    """Each norm, MLP and attention in bf16, on the reference's own input, beside the float64 truth."""
    reference, ours = subject.reference(torch.bfloat16), subject.ours(torch.bfloat16)
    exact = dict(subject.reference(torch.bfloat16).double().named_modules())
    own_calls, layout = calls_of(ours, subject.tokens(4)), layout_of(ours)
    differences = []
    for name, call in calls_of(reference, subject.tokens(4)).items():
        module = call.module
        if name not in own_calls or not list(module.parameters()) or isinstance(module, nn.Linear | nn.Embedding):
            continue
        with torch.no_grad():
            low = first_tensor(call.again(module))
            fusion = layout.locate(name).fusion  # of a norm whose channels have an order of their own
            given = call.input if fusion is None else fusion.fuse([call.input])
            mine = first_tensor(own_calls[name].again(hidden_states=given))
            mine = mine if fusion is None else fusion.split(mine)[0]
            with Exact():
                truth = first_tensor(call.double().again(exact[name]))
        errors = [(x.double() - truth).square().mean().sqrt().item() for x in (mine, low)]
        differences.append(Difference(name, errors[0], MARGIN_IN_BF16 * errors[1]))
    return judge(
        differences,
        f"{len(differences)} modules in bf16, each on the reference's own input",
        hint="where float64 agrees, bf16 rounds more often: a cast is missing or in another place",
    )


def real_rope(subject: Subject) -> Outcome:
    """cos, sin and all that comes of them, with the config's own head_dim, context and scaling, to its last position.

    A tiny head has few frequencies, and those that a scaling blends need not be among them; and bf16 shows at late
    positions whether the tables were rounded before they should be.
    """
    tiny, _ = shrunk(subject.target.config, keep_rope=True)
    last = tiny.max_position_embeddings
    starts = torch.tensor([0, min(4000, last // 2), max(0, last - LENGTH)])
    positions = (starts[:, None] + torch.arange(LENGTH)).to(subject.device)
    with Subject(replace(subject.target, tiny=tiny), subject.device) as full:
        inputs = {"input_ids": full.tokens(3), "position_ids": positions}
        pair = Pair.run(full, inputs)
        outcome, truth, same = _compare(full, pair), pair.expected, pair.actual
        if not outcome.passed:
            return outcome
        low, own = (_low(full, build, inputs) for build in (full.reference, full.ours))
        differences = []
        for point, table in truth.items():
            # an order of channels of its own (for RoPE on neighbouring ones) is no rounding
            if point.side in ("cos", "sin") and point in same and formula("", same[point], table).passed:
                errors = [(x[point].double() - table).square().mean().sqrt().item() for x in (own, low)]
                differences.append(Difference(f"{point} in bf16", errors[0], MARGIN_IN_BF16 * errors[1]))
    return judge(
        [*outcome.differences, *differences],
        f"real head_dim and scaling, positions to {int(positions.max())}",
        hint="the tables are rounded before they should be: keep positions and frequencies in fp32",
    )


def _low(subject: Subject, build: Any, inputs: dict[str, Any]) -> Trace:
    return trace(build(torch.bfloat16), use_cache=False, **inputs)


CHECKS = [
    Check("modules", "layer by layer", layer_by_layer),
    Check("modules", "other positions", positions),
    Check("modules", "real RoPE", real_rope),
    Check("modules", "rounding by module", rounding_by_module),
]
