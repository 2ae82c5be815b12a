"""Self-attention on one fused projection, dispatched through transformers' attention interface.

Shapes: B batch, S sequence, H query heads, K key/value heads, D head_dim.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nemo_automodel.components.models.common.backend import BackendConfig, initialize_rms_norm_module
from nemo_automodel.components.models.common.combined_projection.combined_qkv import (
    CombinedQKVAttentionMixin,
    head_dim_of,
)
from nemo_automodel.components.models.common.rope import apply_rotary_pos_emb
from nemo_automodel.components.models.common.spec import DecoderSpec


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain tensor operations, softmax in fp32; the reference among the implementations.

    Args:
        module: gives ``num_key_value_groups`` (H / K) and ``training``.
        query: ``[B, H, S, D]``.
        key: ``[B, K, S_kv, D]``.
        value: ``[B, K, S_kv, D]``.
        attention_mask: added to the scores, ``[B, 1, S, S_kv]``.
        scaling: factor on the scores.
        dropout: probability of dropping a weight while training.
        **kwargs: ignored; other implementations take more.

    Returns:
        The output ``[B, S, H, D]`` and the weights ``[B, H, S, S_kv]``.
    """
    groups = int(module.num_key_value_groups)  # type: ignore[arg-type]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class DecoderAttention(CombinedQKVAttentionMixin, nn.Module):
    """The attention of every dense family; ``spec`` says what differs."""

    def __init__(self, config: PreTrainedConfig, spec: DecoderSpec, layer_idx: int, backend: BackendConfig):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = head_dim_of(config)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = heads // kv_heads
        self.scaling = spec.attention_scale or self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True  # transformers' sdpa and flash functions read it
        self.sliding_window = spec.sliding_window if spec.layer_types[layer_idx] == "sliding_attention" else None
        self.qk_norm = spec.qk_norm

        self.setup_qkv_projection(config.hidden_size, heads, kv_heads, self.head_dim, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=spec.o_bias)
        if self.qk_norm is not None:
            q_heads, k_heads = (heads, kv_heads) if self.qk_norm == "full" else (1, 1)
            self.q_norm = initialize_rms_norm_module(backend.rms_norm, q_heads * self.head_dim, eps=spec.norm_eps)
            self.k_norm = initialize_rms_norm_module(backend.rms_norm, k_heads * self.head_dim, eps=spec.norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, S, hidden] -> [B, S, hidden]``, and the attention weights where the implementation has them.

        ``attention_mask`` is what transformers' mask functions made for the implementation in use.
        """
        query, key, value = self.compute_qkv(hidden_states)
        if self.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in (query, key, value))
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.flatten(2).contiguous()), weights
