"""Transformer Engine's float8 recipes (arXiv:2209.05433): what a product's operands are scaled by."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Literal

from nemo_automodel.components.models.common.te.engine import package, refuse_off_gpu

MULTIPLE = 16
"""Of channels, which float8 products take; and of tokens, which are filled up."""

RECIPES = {"delayed": "DelayedScaling", "current": "Float8CurrentScaling", "block": "Float8BlockScaling"}
FORMATS = {"hybrid": "HYBRID", "e4m3": "E4M3"}


@dataclass(kw_only=True)
class TEFloat8:
    """Products of a model's linear layers in float8, by Transformer Engine; weights and gradients stay as they are.

    Attributes:
        recipe: ``"current"``, a scale for each tensor from its own values; ``"block"``, one for each block of them;
            ``"delayed"``, one for each tensor from the largest values of earlier steps.
        format: ``"hybrid"`` (E4M3 forward, E5M2 for gradients) or ``"e4m3"``; None: the recipe's own, which is E4M3
            for ``"block"`` and hybrid for the others.
        amax_history: how many steps ``"delayed"`` looks back; None: 1024.
        keep: shell patterns of linear layers' names, as ``layers.0.*``, that this library multiplies in their dtype.

    Raises:
        ValueError: a value that is not one of the above; the message names the field.
    """

    recipe: Literal["delayed", "current", "block"] = field(
        default="current", metadata={"help": "what operands are scaled by: current, block, or delayed (earlier steps)"}
    )
    format: Literal["hybrid", "e4m3"] | None = field(
        default=None, metadata={"help": "hybrid: gradients in E5M2; null: the recipe's own"}
    )
    amax_history: int | None = field(
        default=None, metadata={"help": "steps that recipe=delayed looks back; null: 1024"}
    )
    keep: list[str] = field(
        default_factory=list, metadata={"help": "patterns of layers that stay in their dtype, as 'layers.0.*'"}
    )

    def __post_init__(self) -> None:
        for name, choices in {"recipe": RECIPES, "format": {**FORMATS, None: ""}}.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"te_fp8.{name}={value!r} is not one of {', '.join(map(repr, choices))}")
        if self.amax_history is not None and not self.looks_back:
            raise ValueError(f"te_fp8.amax_history={self.amax_history}: only recipe='delayed' reads it; leave it out")
        if self.amax_history is not None and self.amax_history < 1:
            raise ValueError(f"te_fp8.amax_history={self.amax_history} must be at least 1")

    @property
    def looks_back(self) -> bool:
        """Whether scales are of earlier steps, and so a state that a training must keep."""
        return self.recipe == "delayed"

    def kept(self, names: list[str]) -> set[str]:
        """Which of the linear layers ``names`` stay as they are.

        Raises:
            ValueError: a pattern that matches none.
        """
        for pattern in self.keep:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"te_fp8.keep: {pattern!r} matches no linear layer, such as {names[0]!r}")
        return {name for name in names for pattern in self.keep if fnmatchcase(name, pattern)}

    def refuse_recomputation(self) -> None:
        """Raise a ValueError where a layer that is computed twice would count twice."""
        if self.looks_back:
            raise ValueError(
                "te_fp8.recipe='delayed' does not go with gradient checkpointing: every layer that is computed again "
                "would push the history of all of them on. Use te_fp8.recipe='current' or 'block'"
            )

    def multiplying(self) -> AbstractContextManager[Any]:
        """Within it Transformer Engine multiplies so."""
        recipe = _recipe(self.recipe, self.format, self.amax_history)
        made: AbstractContextManager[Any] = package("pytorch").autocast(enabled=True, recipe=recipe)
        return made


def around_forward(float8: TEFloat8 | None, recomputes: bool) -> AbstractContextManager[Any]:
    """What a model's forward pass runs in: at its end, scales that look back take in what was seen.

    Raises:
        ValueError: there is no GPU, or layers will be computed again, which such scales do not go with.
    """
    if float8 is None or not float8.looks_back:  # a layer by itself is enough
        return nullcontext()
    refuse_off_gpu()
    if recomputes:
        float8.refuse_recomputation()
    return float8.multiplying()


@cache
def _recipe(name: str, format: str | None, amax_history: int | None) -> Any:
    recipe = package("common.recipe")
    options: dict[str, Any] = {}
    if format is not None:
        options["fp8_format"] = getattr(recipe.Format, FORMATS[format])
    if amax_history is not None:
        options["amax_history_len"] = amax_history
    return getattr(recipe, RECIPES[name])(**options)
