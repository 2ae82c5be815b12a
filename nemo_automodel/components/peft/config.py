"""What to adapt and how: the options of a training run, and the rank and scale of each adapted projection."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

ALL_LINEAR = "all-linear"
Value = TypeVar("Value")


@dataclass(frozen=True)
class Update:
    """Rank and scale of one projection's update ``scale * B A``.

    Attributes:
        r: rank; rows of A and columns of B.
        alpha: the scale's numerator.
        rslora: the scale is ``alpha / sqrt(r)`` (arXiv:2312.03732) instead of ``alpha / r``.
    """

    r: int
    alpha: float
    rslora: bool = False

    @property
    def scale(self) -> float:
        """Factor on ``B A``."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


@dataclass(kw_only=True)
class LoRAConfig:
    """What to adapt, and how.

    Raises:
        ValueError: a value out of range, by the field's name.
    """

    r: int = field(default=16, metadata={"help": "rank of the adapters"})
    alpha: float = field(default=32, metadata={"help": "the update is scaled by alpha / r (alpha / sqrt(r): rslora)"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapters' input"})
    targets: list[str] = field(
        default_factory=lambda: [ALL_LINEAR],
        metadata={"help": "projections to adapt, by Hugging Face name (q_proj, ...) or fused name; or [all-linear]"},
    )
    rslora: bool = field(default=False, metadata={"help": "rank-stabilized scaling (arXiv:2312.03732)"})
    dora: bool = field(default=False, metadata={"help": "train each row's magnitude as well (DoRA, arXiv:2402.09353)"})
    share_a: bool = field(default=False, metadata={"help": "one A for all parts of a fused projection"})
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "ranks other than r: projection name, or regular expression for the end of its path -> rank"},
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "alphas other than alpha, as rank_pattern"}
    )

    base_dtype: Literal["auto", "float8"] = field(
        default="auto",
        metadata={
            "help": "of the frozen weights under the adapters; float8: half the memory, products twice as fast on GPUs "
            "that have it (compute capability 8.9 and up); the trained adapter is folded into the original weights"
        },
    )

    def __post_init__(self) -> None:
        if self.base_dtype not in ("auto", "float8"):
            raise ValueError(f"base_dtype={self.base_dtype!r} is not one of 'auto', 'float8'")
        if self.base_dtype == "float8" and (self.dora or self.share_a or self.dropout):
            raise ValueError("base_dtype=float8 goes with plain LoRA: without dora, share_a and dropout")
        for name, rank in {"r": self.r, **{f"rank_pattern.{key}": r for key, r in self.rank_pattern.items()}}.items():
            if rank < 1:
                raise ValueError(f"{name}={rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if not self.targets:
            raise ValueError(f"targets is empty: name projections such as q_proj, or [{ALL_LINEAR}]")

    def update(self, path: str) -> Update:
        """Rank and scale of the Hugging Face module ``path``, such as ``model.layers.0.self_attn.q_proj``."""
        return Update(
            by_pattern(self.rank_pattern, path, self.r), by_pattern(self.alpha_pattern, path, self.alpha), self.rslora
        )


def by_pattern(patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    """peft's rule: the first pattern that matches whole module names at the end of ``path`` decides."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
