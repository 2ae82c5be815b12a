"""Self-attention on one fused projection, dispatched through transformers' attention interface.

Shapes: B batch, S sequence, H query heads, K key/value heads, D head_dim.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nemo_automodel.components.kernels.launch import runs_on, untouched
from nemo_automodel.components.kernels.linear import Linear
from nemo_automodel.components.kernels.qkv_rope import HeadNorms, split_and_turn
from nemo_automodel.components.models.common.backend import BackendConfig, initialize_norm_module
from nemo_automodel.components.models.common.capabilities import BY_IMPLEMENTATION, Need, refuse
from nemo_automodel.components.models.common.combined_projection.combined_qkv import (
    CombinedQKVAttentionMixin,
    head_dim_of,
    kv_heads_of,
)
from nemo_automodel.components.models.common.context import SharedSequence
from nemo_automodel.components.models.common.flex import FLEX, SHORT, short
from nemo_automodel.components.models.common.norm import RMSNorm
from nemo_automodel.components.models.common.rope import apply_rotary_pos_emb, query_growth
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.common.te.rope import Angles, turn


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
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
        softcap: scores become ``softcap * tanh(score / softcap)`` before the mask.
        **kwargs: ignored; other implementations take more.

    Returns:
        The output ``[B, S, H, D]`` and the weights ``[B, H, S, S_kv]``.
    """
    groups = int(module.num_key_value_groups)  # type: ignore[arg-type]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""torch's own kernels, the fastest on an H100 first (benchmarks/RESULTS.md); torch itself begins with flash."""


def _fastest_sdpa(query: Tensor, attention_mask: Tensor | None) -> AbstractContextManager[None]:
    """cuDNN's attention first, where sdpa is causal and without a mask, in half precision on a GPU."""
    if torch.compiler.is_compiling():  # which cannot trace the questions below
        return nullcontext()
    flags = torch.backends.cuda
    all_on = all(  # somebody's own choice stays
        (
            flags.cudnn_sdp_enabled(),
            flags.flash_sdp_enabled(),
            flags.mem_efficient_sdp_enabled(),
            flags.math_sdp_enabled(),
        )
    )
    half = query.dtype in (torch.bfloat16, torch.float16)
    if not (query.is_cuda and half and attention_mask is None and all_on):
        return nullcontext()
    return sdpa_kernel(SDPA_ORDER, set_priority=True)


class DecoderAttention(CombinedQKVAttentionMixin, nn.Module):
    """The attention of every dense family; ``spec`` says what differs.

    Attributes:
        kernels: whether to use the library's own kernel where it can run.
        context: of ranks that share sequences; masks and positions are then whole, all else is of this rank's part.
    """

    kernels = True
    context: SharedSequence | None = None

    def __init__(self, config: PreTrainedConfig, spec: DecoderSpec, layer_idx: int, backend: BackendConfig):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = head_dim_of(config)
        heads, kv_heads = config.num_attention_heads, kv_heads_of(config)
        self.num_key_value_groups = heads // kv_heads
        self.scaling = spec.attention_scale or self.head_dim**-0.5
        self.softcap = {} if spec.attention_softcap is None else {"softcap": spec.attention_softcap}
        self.attention_dropout = config.attention_dropout if spec.attention_dropout is None else spec.attention_dropout
        self.is_causal = True  # transformers' sdpa and flash functions read it
        self.sliding_window = spec.sliding_window if spec.layer_types[layer_idx] == "sliding_attention" else None
        self.query_growth = spec.rope.query_growth
        self.turns = spec.rope.turns(layer_idx)
        self.qk_norm = spec.qk_norm
        self.qk_norm_after_rope = spec.qk_norm_after_rope
        # dropout is nobody's need before it trains
        refuse(BY_IMPLEMENTATION.get(config._attn_implementation), replace(self.need(), dropout=0.0))

        self.setup_qkv_projection(config.hidden_size, heads, kv_heads, self.head_dim, bias=spec.qkv_bias)
        self.o_proj = Linear(heads * self.head_dim, config.hidden_size, bias=spec.o_bias)
        if self.qk_norm is not None:
            for name, count in (("q_norm", heads), ("k_norm", kv_heads)):
                weight = {"head": self.head_dim, "per_head": (count, self.head_dim), "full": count * self.head_dim}
                norm = initialize_norm_module(backend.rms_norm, spec.norm, weight[self.qk_norm], eps=spec.norm_eps)
                self.add_module(name, norm)

    def need(self) -> Need:
        """What this layer asks of its attention, wherever it is."""
        softcap, dropout = self.softcap.get("softcap"), self.attention_dropout
        return Need(head_dim=self.head_dim, window=self.sliding_window, softcap=softcap, dropout=dropout)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | Angles | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, S, hidden] -> [B, S, hidden]``, and the attention weights where the implementation has them.

        ``attention_mask`` is what transformers' mask functions made for the implementation in use.
        """
        norms = self._norms_before_rope(hidden_states)
        by_kernel = self.kernels and self.turns and runs_on(hidden_states)
        if by_kernel and not isinstance(norms, str) and not isinstance(position_embeddings, Angles):
            assert position_embeddings is not None
            qkv = self.qkv_proj(hidden_states)
            query, key, value = split_and_turn(
                qkv, *position_embeddings, self.num_key_value_groups, self.head_dim, norms
            )
        else:
            query, key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in self.compute_qkv(hidden_states))
            if self.qk_norm is not None and not self.qk_norm_after_rope:
                query, key = self._normed("q_norm", query), self._normed("k_norm", key)
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            if self.turns:
                assert position_embeddings is not None
                if isinstance(position_embeddings, Angles):
                    query, key = turn(query, key, position_embeddings)
                else:
                    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if self.qk_norm is not None and self.qk_norm_after_rope:
            query = self._normed("q_norm", query.transpose(1, 2)).transpose(1, 2)
            key = self._normed("k_norm", key.transpose(1, 2)).transpose(1, 2)
        if self.query_growth is not None:
            assert position_ids is not None
            own = position_ids if self.context is None else self.context.part(position_ids)
            query = query * query_growth(own, *self.query_growth).to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        with _fastest_sdpa(query, attention_mask):
            output, weights = self._attend(query, key, value, attention_mask, position_ids, **kwargs)
        output = output.flatten(2).contiguous()
        if output.requires_grad and not torch.compiler.is_compiling():
            # torch 2.11's backward pass through cuDNN takes this gradient's rows to lie as the output's do, unasked
            output.register_hook(Tensor.contiguous)
        return self.o_proj(output), weights

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        function = self._attention_function()
        if self.config._attn_implementation == FLEX and short(query.shape[2], query.device):
            kwargs = SHORT | kwargs
        if torch.are_deterministic_algorithms_enabled():  # FlashAttention's packages do not ask torch
            kwargs.setdefault("deterministic", True)
        if self.context is not None:
            function = partial(self.context.attend, function)
        return function(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            position_ids=position_ids,
            **self.softcap,
            **kwargs,
        )

    def _norms_before_rope(self, hidden_states: Tensor) -> HeadNorms | Literal["other"] | None:
        """Norms of queries and keys before RoPE: None where there are none, "other" where the kernel has not theirs."""
        if self.qk_norm is None or self.qk_norm_after_rope:
            return None
        q, k = (self.get_submodule(name) for name in ("q_norm", "k_norm"))
        if not (isinstance(q, RMSNorm) and isinstance(k, RMSNorm) and self.qk_norm == "head"):
            return "other"
        if not (
            untouched(q, RMSNorm)
            and untouched(k, RMSNorm)
            and q.in_kernels(hidden_states)
            and k.in_kernels(hidden_states)
        ):
            return "other"
        return HeadNorms(q.weight, k.weight, q.eps, q.offset)

    def _normed(self, name: str, heads: Tensor) -> Tensor:
        """``[B, S, heads, D]``, normalised over each head or over all of them."""
        norm = self.get_submodule(name)
        return norm(heads.flatten(2)).unflatten(-1, (-1, self.head_dim)) if self.qk_norm == "full" else norm(heads)

    def _attention_function(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """transformers' function of that name.

        Raises:
            ValueError: it would leave out the softcap or, training, dropout.
        """
        name = self.config._attn_implementation or "eager"
        known = BY_IMPLEMENTATION.get(name)
        if self.training and self.attention_dropout:
            refuse(known, self.need())
        if self.softcap and (known is None or "softcap" not in known.has):
            refuse(known, self.need())
            if "flash" not in name:
                raise ValueError(
                    f"attention {name!r} is none of {', '.join(map(repr, BY_IMPLEMENTATION))}, and may leave out the "
                    f"softcap on the scores that this model needs ({self.softcap['softcap']})"
                )
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
