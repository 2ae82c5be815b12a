"""Module by module in float64, where right formulas agree to thirteen digits and wrong ones do not."""

from typing import Any

import torch

from nemo_automodel.verify.check import Check
from nemo_automodel.verify.diagnosis import explain
from nemo_automodel.verify.exact import Exact
from nemo_automodel.verify.outcome import Outcome, formula
from nemo_automodel.verify.subject import Subject
from nemo_automodel.verify.trace import Point, trace


def layer_by_layer(subject: Subject) -> Outcome:
    """Names the first place in the forward pass where the two part, and what the difference looks like."""
    return compare_modules(subject, input_ids=subject.tokens())


def positions(subject: Subject) -> Outcome:
    """The same at positions that start late, and differ between rows."""
    ids = subject.tokens(length=12)
    late = torch.stack([torch.arange(5, 17), torch.arange(11, 23)]).to(subject.device)
    return compare_modules(subject, input_ids=ids, position_ids=late)


def compare_modules(subject: Subject, **inputs: Any) -> Outcome:
    """Run both in float64 on ``inputs`` and compare all that their modules take and give."""
    with Exact():
        reference, ours = subject.reference(torch.float64), subject.ours(torch.float64)
        expected, actual = (trace(model, use_cache=False, **inputs) for model in (reference, ours))
        shared = [point for point in expected if point in actual]
        differences = tuple(formula(str(point), actual[point], expected[point]) for point in shared)
        wrong = [(point, each) for point, each in zip(shared, differences, strict=True) if not each.passed]
        if wrong:
            point, first = wrong[0]
            looks = explain(point, expected, actual, reference, ours, inputs)
            where = str(point) if point.module else "the logits"
            return Outcome(
                False,
                f"the first to part is {where}, by {first.error:.2g} ({first.bound:.2g} allowed): {looks}",
                differences,
            )
    absent = sorted({point.module for point in expected if point.side == "output" and point not in actual})
    detail = f"{len(shared)} inputs and outputs of modules agree in float64"
    if absent:
        detail += f"; not compared, since not there under that name: {', '.join(absent[:4])}"
    if Point("", "output") not in shared or len(shared) < 2 * subject.config.num_hidden_layers:
        return Outcome(False, f"too few modules have the reference's names to compare: {detail}", differences)
    return Outcome(True, detail, differences)


CHECKS = [
    Check("modules", "layer by layer", layer_by_layer),
    Check("modules", "other positions", positions),
]
