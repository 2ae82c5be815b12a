"""Attention by Transformer Engine's ``DotProductAttention``, which picks cuDNN's, FlashAttention's or its own kernel.

Shapes: B batch, S sequence, T = B * S tokens, H query heads, K key/value heads, D head_dim, N documents.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from nemo_automodel.components.models.common.te.engine import package
from nemo_automodel.components.models.common.varlen import TE, Documents, documents_seen, no_mask


@cache
def dot_product(
    heads: int,
    kv_heads: int,
    head_dim: int,
    scaling: float | None,
    window: int | None,
    dropout: float,
    deterministic: bool,
) -> Any:
    """Transformer Engine's module for layers of this kind, all of which share it: it has no parameters, and no layer.

    Args:
        heads: H.
        kv_heads: K.
        head_dim: D.
        scaling: factor on the scores; None: ``D ** -0.5``.
        window: tokens that a token sees, its own included.
        dropout: probability of dropping a weight.
        deterministic: what torch says when it is made, which Transformer Engine reads then.
    """
    return package("pytorch").DotProductAttention(
        heads,
        head_dim,
        num_gqa_groups=kv_heads,
        attention_dropout=dropout,
        qkv_format="bshd",
        softmax_scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
    )


def layout_of(documents: Documents, batch: int) -> dict[str, Any]:
    """How Transformer Engine is told where documents begin; each row of the ``batch`` begins with one.

    A document in each row is the plain case, which takes ``[B, S, heads, D]``; others lie end to end, in
    ``[T, heads, D]``.
    """
    bounds, longest = documents
    if len(bounds) == batch + 1:
        return {"qkv_format": "bshd", "attn_mask_type": "causal"}
    ends = {f"cu_seqlens_{which}": bounds for which in ("q", "kv")}
    lengths = {f"max_seqlen_{which}": longest for which in ("q", "kv")}
    return {"qkv_format": "thd", "attn_mask_type": "padding_causal", "pad_between_seqs": False, **ends, **lengths}


@torch.compiler.disable
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    """``[B, H, S, D]``, ``[B, K, S, D]`` twice -> ``[B, S, H, D]``."""
    batch, heads, length, head_dim = query.shape
    layout = layout_of(documents, batch)
    inputs = [x.transpose(1, 2) for x in (query, key, value)]
    if layout["qkv_format"] == "thd":
        inputs = [x.flatten(0, 1) for x in inputs]
    deterministic = torch.are_deterministic_algorithms_enabled()
    module = dot_product(heads, key.shape[1], head_dim, scaling, window, dropout, deterministic)
    # the recipe of the linear layers around it would make a state in the shared module
    with package("pytorch").autocast(enabled=False):
        output: Tensor = module(*inputs, **layout)
    return output.view(batch, length, heads, head_dim)


def te_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document, under transformers' interface; see `varlen_attention_forward`.

    Returns:
        The output ``[B, S, H, D]``, and no weights.
    """
    need = {"softcap": softcap or None, "dropout": dropout}
    documents = documents_seen(TE, module, query, key, attention_mask, position_ids, kwargs, **need)
    return attend(query, key, value, documents, scaling, sliding_window, dropout), None


AttentionInterface.register(TE, te_attention_forward)
AttentionMaskInterface.register(TE, partial(no_mask, TE))
