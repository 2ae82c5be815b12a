"""What a dense family is: the slots of the common decoder, filled once from the family's config."""

from dataclasses import astuple, dataclass, field
from typing import Literal

from torch import nn

from nemo_automodel.components.models.common.combined_projection.combined_mlp import CombinedGateUpMLP

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True)
class NormSlots:
    """Where a decoder layer normalises: the module's name (as in the HF checkpoint) per place, None where it does not.

    Llama normalises before both branches; Gemma 2 before and after them; OLMo 2 after them only.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None

    def names(self) -> list[str]:
        """Of the norms that there are."""
        return [name for name in astuple(self) if name is not None]


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """How a family differs from the plainest decoder (pre-norm, RoPE, gated MLP, no bias).

    Attributes:
        norm_eps: epsilon of every norm.
        layer_types: ``"full_attention"`` or ``"sliding_attention"``, one per layer.
        qkv_bias: whether the fused query/key/value projection has a bias.
        o_bias: whether the output projection has one.
        sliding_window: tokens a sliding layer sees, its own included.
        qk_norm: RMSNorm on queries and keys before RoPE, over each head or over the full width.
        attention_scale: factor on the scores; None means ``head_dim ** -0.5``.
        norms: where a layer normalises.
        mlp: the MLP's class, built from the config.
        embedding_multiplier: factor on the token embeddings.
        residual_multiplier: factor on each branch before it joins the residual stream.
        logits_multiplier: factor on the logits.

    Raises:
        ValueError: an unknown layer type, or sliding layers without a window.
    """

    norm_eps: float
    layer_types: tuple[str, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    sliding_window: int | None = None
    qk_norm: Literal["head", "full"] | None = None
    attention_scale: float | None = None
    norms: NormSlots = field(default_factory=NormSlots)
    mlp: type[nn.Module] = CombinedGateUpMLP
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.layer_types) - set(LAYER_TYPES)):
            raise ValueError(f"layer_types contains {unknown[0]!r}; known are {', '.join(LAYER_TYPES)}")
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise ValueError(f"layer_types asks for sliding attention, but sliding_window={self.sliding_window}")
