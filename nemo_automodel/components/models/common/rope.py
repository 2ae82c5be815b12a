"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), half-split, every type that transformers knows."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from nemo_automodel.components.models.common.combined_projection.combined_qkv import head_dim_of


def default_inverse_frequencies(config: PreTrainedConfig, **kwargs: Any) -> tuple[Tensor, float]:
    """``theta^(-2i/d)`` for ``i < d/2`` (fp32 ``[d/2]``), and the factor 1.0 on cos and sin."""
    dim = head_dim_of(config)
    exponent = torch.arange(0, dim, 2, dtype=torch.float) / dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponent, 1.0


class RotaryEmbedding(nn.Module):
    """cos and sin tables for a batch of positions, computed in fp32 from the config.

    The attributes (``rope_type``, ``inv_freq``, ``original_inv_freq``, ``max_seq_len_cached``, ...) carry the names
    that transformers' `dynamic_rope_update` works on, which re-computes the frequencies of the dynamic and longrope
    types when the sequence length asks for it.

    Args:
        config: a config with ``rope_parameters`` and ``max_position_embeddings``.

    Raises:
        ValueError: a ``rope_type`` that transformers does not know.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor
    compute_default_rope_parameters = staticmethod(default_inverse_frequencies)

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        known = {"default": default_inverse_frequencies, **ROPE_INIT_FUNCTIONS}
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
    @dynamic_rope_update
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin ``[batch, seq, rotary_dim]``, in ``hidden_states``' dtype, for positions ``[batch, seq]``."""
        inv_freq = self.inv_freq.to(device=hidden_states.device, dtype=torch.float)
        angles = position_ids[..., None].float() * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        scale = self.attention_scaling
        return (angles.cos() * scale).to(hidden_states.dtype), (angles.sin() * scale).to(hidden_states.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """``(x1, x2) -> (-x2, x1)``, halves of the last dimension."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys ``[batch, heads, seq, head_dim]`` by ``cos``/``sin`` ``[batch, seq, rotary_dim]``.

    With ``rotary_dim < head_dim`` only the first ``rotary_dim`` channels turn.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary_dim = cos.shape[-1]
    if rotary_dim == x.shape[-1]:
        return x * cos + rotate_half(x) * sin
    turned, kept = x[..., :rotary_dim], x[..., rotary_dim:]
    return torch.cat((turned * cos + rotate_half(turned) * sin, kept), dim=-1)
