"""What a check found: differences, each beside its bound."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

MARGIN = 8.0
"""How many times the reference's own rounding error a right implementation may be off in the same dtype.

Two right orders of the same roundings differ by the sum of both errors, and the largest error of a few thousand
elements scatters by a factor of two or three from one order to the next. Mistakes in a formula are larger by orders of
magnitude: see the mutation tests.
"""


@dataclass(frozen=True)
class Difference:
    """One quantity of the implementation beside the reference's.

    Attributes:
        name: of a module, parameter or output.
        error: largest absolute difference; infinite where a value is NaN or a shape differs.
        bound: the largest that is no mistake.
    """

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within its bound."""
        return self.error <= self.bound

    @property
    def ratio(self) -> float:
        """Error in units of the bound; a bound of zero asks for bitwise equality."""
        if self.bound:
            return self.error / self.bound
        return math.inf if self.error else 0.0


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Attributes:
        passed: None where the check does not apply to this model, or cannot run here.
        detail: what was compared, or what is wrong and what it looks like.
        differences: each with its bound; plotted by the HTML report.
    """

    passed: bool | None
    detail: str
    differences: tuple[Difference, ...] = field(default=(), repr=False)

    @property
    def worst(self) -> Difference | None:
        """The difference that is furthest from, or closest to, breaking its bound."""
        return max(self.differences, key=lambda difference: difference.ratio, default=None)


class NotApplicable(Exception):
    """Raised by a check that has nothing to look at in this model, or lacks what it needs; the message says why."""


def judge(differences: Iterable[Difference], what: str, *, hint: str = "") -> Outcome:
    """Passed when every difference is within its bound; ``what`` was compared, ``hint`` says what a failure means.

    Raises:
        ValueError: nothing was compared.
    """
    found = tuple(differences)
    if not found:
        raise ValueError(f"{what}: nothing was compared")
    wrong = [difference for difference in found if not difference.passed]
    if not wrong:
        return Outcome(True, what, found)
    worst = max(wrong, key=lambda difference: difference.ratio)
    parts = [f"{worst.name} differs by {worst.error:.2g}, {worst.bound:.2g} is allowed"]
    if len(wrong) > 1:
        parts.append(f"{len(wrong)} of {len(found)} differ")
    return Outcome(False, "; ".join([*parts, *([hint] if hint else [])]), found)


def largest(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite where shapes differ or a value is not a number."""
    if actual.shape != expected.shape:
        return math.inf
    if not actual.numel():
        return 0.0
    error = (actual.double() - expected.double()).abs().max().item()
    return error if math.isfinite(error) else math.inf


def rounding(name: str, actual: Tensor, reference: Tensor, truth: Tensor) -> Difference:
    """The implementation and the reference in one dtype, beside the float64 truth.

    The bound is `MARGIN` times the reference's own largest error (of one unit of rounding of the largest value at
    least: where the reference happens to be exact, the implementation need not).
    """
    unit = torch.finfo(reference.dtype).eps / 2
    own = max(largest(reference, truth), unit * truth.abs().max().item())
    return Difference(name, largest(actual, truth), MARGIN * own)


def bitwise(name: str, actual: Tensor, expected: Tensor) -> Difference:
    """Equal in every bit, or not."""
    same = actual.dtype == expected.dtype and actual.shape == expected.shape
    same = same and torch.equal(actual.flatten().view(torch.uint8), expected.flatten().view(torch.uint8))
    return Difference(name, 0.0 if same else largest(actual, expected) or math.inf, 0.0)


FORMULA = 2.0**-33
"""How far two right formulas may part in float64, as a share of the largest value.

A unit of rounding is 2^-53; accumulations over the widths and depths of tiny models, and the cancellation in a softmax
or a norm, cost less than twelve bits. 2^-33 leaves eight more, and is a ten-thousandth of the effect of the subtlest
mistake here, an epsilon of 1e-6 instead of 1e-5 beside a mean square of one.
"""

ZERO = 1e-4
"""The least value that its share is taken of: the keys' bias, where no position turns them, has a gradient of zero, and
what comes out is the rounding of the terms that cancel."""


def formula(name: str, actual: Tensor, expected: Tensor) -> Difference:
    """Two float64 computations of what should be the same formula."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    return Difference(name, largest(actual, expected), FORMULA * max(scale, ZERO))
