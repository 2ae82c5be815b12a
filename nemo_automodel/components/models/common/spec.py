"""What a dense family is: the slots of the common decoder, filled once from the family's config."""

from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Literal

from torch import nn
from transformers import PreTrainedConfig

from nemo_automodel.components.models.common.combined_projection.combined_mlp import CombinedGateUpMLP
from nemo_automodel.components.models.common.norm import NormSpec
from nemo_automodel.components.models.common.rope import RopeSpec

LAYER_TYPES = ("full_attention", "sliding_attention")
QK_NORMS = ("head", "per_head", "full")


@dataclass(frozen=True, kw_only=True)
class NormSlots:
    """Where a decoder layer normalises: the module's name (as in the HF checkpoint) per place, None where it does not.

    Llama normalises before both branches; Gemma 2 before and after them; OLMo 2 after them only. One name at two
    places is one norm: Cohere's attention and MLP read the same.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None

    def names(self) -> list[str]:
        """Of the norms that there are."""
        return [name for name in dict.fromkeys(astuple(self)) if name is not None]


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """How a family differs from the plainest decoder (pre-norm, RoPE, gated MLP, no bias).

    Attributes:
        norm_eps: epsilon of every norm.
        layer_types: ``"full_attention"`` or ``"sliding_attention"``, one per layer.
        qkv_bias: whether the fused query/key/value projection has a bias.
        o_bias: whether the output projection has one.
        sliding_window: tokens a sliding layer sees, its own included.
        norm: the kind of every norm.
        norms: where a layer normalises.
        parallel: attention and MLP both read the layer's input, and are added to it together.
        qk_norm: norms of queries and keys: over each head, with one weight or a weight for each (``"per_head"``), or
            over the full width.
        qk_norm_after_rope: whether they come after RoPE instead of before it.
        attention_scale: factor on the scores; None means ``head_dim ** -0.5``.
        attention_softcap: scores become ``cap * tanh(score / cap)``.
        attention_dropout: probability of dropping an attention weight; None means ``config.attention_dropout``.
        rope: how queries and keys turn.
        mlp: builds the MLP from the config: a class, or a `functools.partial` of one.
        embedding_padding: whether the row of ``config.pad_token_id`` never learns, as `torch.nn.Embedding` has it.
        embedding_multiplier: factor on the token embeddings.
        embedding_multiplier_rounded: whether ``embed_tokens`` itself multiplies, by that factor rounded to its dtype;
            otherwise a given ``inputs_embeds`` is multiplied too.
        embedding_dropout: probability of dropping a channel of them while training.
        residual_multiplier: factor on each branch before it joins the residual stream.
        residual_dropout: probability of dropping a channel of a branch while training.
        logits_multiplier: factor on the logits.
        logits_softcap: logits then become ``cap * tanh(logit / cap)``.

    Raises:
        ValueError: an unknown layer type or query/key norm, sliding layers without a window, or a list of layers of
            another length.
    """

    norm_eps: float
    layer_types: tuple[str, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    sliding_window: int | None = None
    norm: NormSpec = field(default_factory=NormSpec)
    norms: NormSlots = field(default_factory=NormSlots)
    parallel: bool = False
    qk_norm: Literal["head", "per_head", "full"] | None = None
    qk_norm_after_rope: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_dropout: float | None = None
    rope: RopeSpec = field(default_factory=RopeSpec)
    mlp: Callable[[PreTrainedConfig], nn.Module] = CombinedGateUpMLP
    embedding_padding: bool = True
    embedding_multiplier: float = 1.0
    embedding_multiplier_rounded: bool = False
    embedding_dropout: float = 0.0
    residual_multiplier: float = 1.0
    residual_dropout: float = 0.0
    logits_multiplier: float = 1.0
    logits_softcap: float | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.layer_types) - set(LAYER_TYPES)):
            raise ValueError(f"layer_types contains {unknown[0]!r}; known are {', '.join(LAYER_TYPES)}")
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise ValueError(f"layer_types asks for sliding attention, but sliding_window={self.sliding_window}")
        if self.qk_norm not in (None, *QK_NORMS):
            raise ValueError(f"qk_norm={self.qk_norm!r} is not one of {', '.join(QK_NORMS)}")
        if self.rope.layers is not None and len(self.rope.layers) != len(self.layer_types):
            raise ValueError(
                f"rope.layers is for {len(self.rope.layers)} layers, layer_types for {len(self.layer_types)}"
            )
