"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), half-split, every type that transformers knows."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from nemo_automodel.components.models.common.combined_projection.combined_qkv import head_dim_of
from nemo_automodel.components.models.common.context import SharedSequence
from nemo_automodel.components.models.common.te.rope import Angles


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """How a family turns its queries and keys; which frequencies, the config's ``rope_parameters`` say.

    Attributes:
        layers: whether each layer's queries and keys turn; None: all do.
        share: of a head's channels, the part that turns, with ``rope_type`` "default" (transformers' functions for the
            other types read ``partial_rotary_factor`` themselves).
        frequencies: the family's own function of the config, which gives the inverse frequencies and the factor on
            cos and sin, whatever ``rope_type`` says and the sequence length is.
        fp32_tables: keep cos and sin in fp32, which makes the rotation one in fp32.
        fp32_rotation: turn queries and keys in fp32, by tables that were rounded unless ``fp32_tables`` is set as well.
        query_growth: ``(beta, length)``: queries are multiplied by ``1 + beta * log(1 + floor(position / length))``.
    """

    layers: tuple[bool, ...] | None = None
    share: float = 1.0
    frequencies: Callable[[PreTrainedConfig], tuple[Tensor, float]] | None = None
    fp32_tables: bool = False
    fp32_rotation: bool = False
    query_growth: tuple[float, int] | None = None

    def turns(self, layer_idx: int) -> bool:
        """Whether the layer's queries and keys turn."""
        return self.layers is None or self.layers[layer_idx]


def rope_field(config: Any, name: str, default: Any = None) -> Any:
    """What ``config.rope_parameters`` says under ``name``; ``default`` where it says nothing."""
    return config.rope_parameters.get(name, default)


def default_inverse_frequencies(config: PreTrainedConfig, share: float = 1.0, **kwargs: Any) -> tuple[Tensor, float]:
    """``theta^(-2i/d)`` for ``i < d/2`` (fp32 ``[d/2]``, ``d`` channels turn), and the factor 1.0 on cos and sin."""
    dim = int(head_dim_of(config) * share)
    exponent = torch.arange(0, dim, 2, dtype=torch.float) / dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponent, 1.0


def rotary_embedding(config: PreTrainedConfig, spec: RopeSpec) -> "RotaryEmbedding | RotaryEmbeddings | None":
    """The tables of a model: one for all layers, or one for each layer type where the config says so; None: no RoPE."""
    if spec.layers is not None and not any(spec.layers):
        return None
    nested = any(isinstance(value, dict) for value in config.rope_parameters.values())
    return RotaryEmbeddings(config, spec) if nested else RotaryEmbedding(config, spec)


class RotaryEmbedding(nn.Module):
    """cos and sin tables for a batch of positions, computed in fp32 from the config.

    The attributes (``rope_type``, ``inv_freq``, ``original_inv_freq``, ``max_seq_len_cached``, ...) carry the names
    that transformers' `dynamic_rope_update` works on, which re-computes the frequencies of the dynamic and longrope
    types when the sequence length asks for it.

    Args:
        config: a config with ``rope_parameters`` and ``max_position_embeddings``.
        spec: what differs from Llama's.

    Attributes:
        context: of ranks that share sequences, whose tables are of this rank's part.
        fused: whether Transformer Engine turns queries and keys, by `Angles` instead of tables.

    Raises:
        ValueError: a ``rope_type`` that transformers does not know.
    """

    context: SharedSequence | None = None
    fused = False
    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: PreTrainedConfig, spec: RopeSpec = RopeSpec()):
        super().__init__()
        self.config = config
        self.fp32_tables, self.fp32_rotation = spec.fp32_tables, spec.fp32_rotation
        # transformers calls it as well, to fill the buffers of a model that was built on the meta device
        default = spec.frequencies or partial(default_inverse_frequencies, share=spec.share)
        self.compute_default_rope_parameters = default
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"] if spec.frequencies is None else "default"
        known = {"default": default, **ROPE_INIT_FUNCTIONS}
        if self.rope_type not in known:
            raise ValueError(f"rope_parameters.rope_type={self.rope_type!r} is not one of {', '.join(sorted(known))}")
        inv_freq, self.attention_scaling = known[self.rope_type](config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "RotaryEmbedding":
        # model.to(bfloat16) must not round the frequencies: at position 10^4 that is an error of tens of radians
        exact = {name: buffer.clone() for name, buffer in self.named_buffers() if buffer.device.type != "meta"}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            if (moved := getattr(self, name)).dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        return self

    @torch.no_grad()
    @dynamic_rope_update  # which asks for the longest position: ranks that share a sequence must agree on it
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor] | Angles:
        """cos and sin ``[batch, seq, rotary_dim]``, in ``hidden_states``' dtype or fp32, for ``[batch, seq]``."""
        if self.context is not None:
            position_ids = self.context.part(position_ids)
        inv_freq = self.inv_freq.to(device=hidden_states.device, dtype=torch.float)
        angles = position_ids[..., None].float() * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        if self.fused:
            return Angles(angles, self.attention_scaling)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        if not self.fp32_tables:
            cos, sin = cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)
        return (cos.float(), sin.float()) if self.fp32_rotation else (cos, sin)


class RotaryEmbeddings(nn.ModuleDict):
    """A `RotaryEmbedding` for each layer type, of a config whose ``rope_parameters`` are a dict of them."""

    def __init__(self, config: PreTrainedConfig, spec: RopeSpec):
        tables = {}
        for layer_type in sorted(set(config.layer_types)):
            of_type = copy.copy(config)  # so that everything below it reads flat parameters
            of_type.rope_parameters = config.rope_parameters[layer_type]
            tables[layer_type] = RotaryEmbedding(of_type, spec)
        super().__init__(tables)


def rotate_half(x: Tensor) -> Tensor:
    """``(x1, x2) -> (-x2, x1)``, halves of the last dimension."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys ``[batch, heads, seq, head_dim]`` by ``cos``/``sin`` ``[batch, seq, rotary_dim]``.

    With ``rotary_dim < head_dim`` only the first ``rotary_dim`` channels turn. With tables in fp32 the rotation is in
    fp32, and rounded once to the dtypes of ``q`` and ``k``.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate(q, cos, sin).to(q.dtype), _rotate(k, cos, sin).to(k.dtype)


def query_growth(position_ids: Tensor, beta: float, length: int) -> Tensor:
    """``1 + beta * log(1 + floor(position / length))``, ``[batch, 1, seq, 1]`` for positions ``[batch, seq]``."""
    return (1 + beta * torch.log(1 + torch.floor(position_ids / length)))[:, None, :, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary_dim = cos.shape[-1]
    if rotary_dim == x.shape[-1]:
        return x * cos + rotate_half(x) * sin
    turned, kept = x[..., :rotary_dim], x[..., rotary_dim:]
    return torch.cat((turned * cos + rotate_half(turned) * sin, kept), dim=-1)
