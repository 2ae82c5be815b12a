"""LoRA (Hu et al. 2021, arXiv:2106.09685) whose parts keep their own A and B inside a fused projection.

The maths is peft's on the separate projections: ``q = (W_q + scale * B_q A_q) x``, and so for each targeted part. The
parts' A are stacked, so the input is read once; their B are laid out as the fused projection's rows are.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_automodel.components.layout import Fusion, Layout

ALL_LINEAR = "all-linear"


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

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r={self.r} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if not self.targets:
            raise ValueError(f"targets is empty: name projections such as q_proj, or [{ALL_LINEAR}]")

    @property
    def scale(self) -> float:
        """Factor on ``B A``."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


class LoRALinear(nn.Linear):
    """A linear layer, fused or not, with a low-rank update per targeted part.

    ``weight`` and ``bias`` are the frozen layer's own parameters, under their old names.

    Attributes:
        lora_A: part name -> ``[r, in_features]``.
        lora_B: part name -> ``[rows of the part, r]``; starts at zero, so the layer starts as it was.
    """

    def __init__(self, base: nn.Linear, name: str, targets: list[str], fusion: Fusion | None, config: LoRAConfig):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.fusion = fusion
        self.parts = fusion.parts if fusion else (name,)
        self.rank, self.scale = config.r, config.scale
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        options: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for part in targets:
            rows = fusion.part_shape(base.weight.shape, part)[0] if fusion else base.out_features
            self.lora_A[part] = nn.Parameter(torch.empty(config.r, base.in_features, **options))
            self.lora_B[part] = nn.Parameter(torch.zeros(rows, config.r, **options))
            nn.init.kaiming_uniform_(self.lora_A[part], a=math.sqrt(5))  # as peft, so that seeds compare

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        a, b = self.stacked()
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(self.dropout(x), a), b) * self.scale

    def stacked(self) -> tuple[Tensor, Tensor]:
        """The update's factors over all parts: A ``[parts * r, in]`` and B ``[out, parts * r]`` in the fused rows."""
        targets = list(self.lora_A)
        a = torch.cat([self.lora_A[part] for part in targets])
        if self.fusion is None:
            return a, self.lora_B[targets[0]]
        columns = []
        for part in self.parts:
            if part in targets:
                before = targets.index(part) * self.rank
                after = a.shape[0] - before - self.rank
                columns.append(F.pad(self.lora_B[part], (before, after)))
            else:
                rows = self.fusion.part_shape(self.weight.shape, part)[0]
                columns.append(a.new_zeros(rows, a.shape[0]))
        return a, self.fusion.fuse(columns)

    def delta(self) -> Tensor:
        """What the adapters add to ``weight``, in fp32."""
        a, b = self.stacked()
        return b.float() @ a.float() * self.scale


def apply_lora(model: nn.Module, config: LoRAConfig, layout: Layout) -> list[str]:
    """Freeze ``model`` and put adapters on the targeted projections; returns the adapted modules' names.

    Raises:
        ValueError: a target that is no projection of the model (the message lists those there are), or none at all.
    """
    head = _output_head(model)
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    parts = {name: _part_names(name, layout) for name in linears}
    known = {part for names in parts.values() for part in names} | {name.rpartition(".")[2] for name in linears}
    everything = config.targets == [ALL_LINEAR]
    if not everything and (unknown := sorted(set(config.targets) - known)):
        raise ValueError(
            f"targets: {unknown[0]!r} is no projection of this model; there are {', '.join(sorted(known))}"
        )

    model.requires_grad_(False)
    adapted = []
    for name, linear in linears.items():
        leaf = name.rpartition(".")[2]
        targets = [p for p in parts[name] if everything or p in config.targets or leaf in config.targets]
        if targets:
            model.set_submodule(name, LoRALinear(linear, leaf, targets, layout.fusion_of(name), config))
            adapted.append(name)
    if not adapted:
        raise ValueError("LoRA found no linear projection to adapt in this model")
    return adapted


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Fold every adapter into its weight (added in fp32, rounded once) and put plain linear layers back."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight, linear.bias = module.weight, module.bias
            linear.weight.copy_((module.weight.float() + module.delta()).to(module.weight.dtype))
            model.set_submodule(name, linear.train(module.training))


def _part_names(module_name: str, layout: Layout) -> tuple[str, ...]:
    fusion = layout.fusion_of(module_name)
    return fusion.parts if fusion else (module_name.rpartition(".")[2],)


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None
