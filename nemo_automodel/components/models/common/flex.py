"""Block masks for torch's flex attention (arXiv:2412.05496), from what each token sees: which is always one stretch.

A token sees those from ``first`` to itself, where ``first`` is where its document begins, its window, or what comes
after padding. It never falls from one token to the next, so its values at the ends of a block say which blocks of the
scores there are: nothing of the size of the scores is ever made, nor compiled, and one function tells tokens apart in
the blocks at the edges, whatever the documents and windows are.
Shapes: B batch, Q tokens of this pass, K keys, of which the last are those tokens' own, in N and M blocks.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, DynamicCache

FLEX = "flex_attention"
"""Among transformers' attention implementations."""

BLOCK = 128
"""Tokens in a block, as torch has it by default; its kernels' tiles divide it."""


SHORT = {"kernel_options": {"FORCE_USE_FLEX_ATTENTION": True}}
"""For fewer tokens than a block, which torch gives to its kernel for decoding: that wants all query heads of a key head
in one tile, and where they are more than a block compiling ends with "No choices to select"."""


def short(length: int, device: torch.device) -> bool:
    """Whether so many queries want `SHORT`; a single one is what the other kernel is made for."""
    return device.type == "cuda" and 1 < length < BLOCK


def block_masks(
    layers: dict[str, tuple[int, int | None]],
    inputs_embeds: Tensor,
    attention_mask: Any,
    cache: Cache | None,
    position_ids: Tensor | None,
) -> dict[str, BlockMask] | None:
    """The masks of one forward pass; those of rows without documents, padding and cache are kept for the next ones.

    Args:
        layers: layer type -> number of a layer of that type, and the tokens that one of its tokens sees, its own
            included; None: all before it.
        inputs_embeds: ``[B, Q, hidden]``.
        attention_mask: None, or ``[B, tokens so far]``, 0 at padding.
        cache: to read from.
        position_ids: ``[B or 1, Q]``, not going on from one token to the next where a document begins; looked at where
            there is neither mask nor cache.

    Returns:
        Layer type -> mask; None for masks of another kind (ready made, with holes) and caches of a fixed size, which
        are transformers' to make.
    """
    if torch.compiler.is_compiling() or not (cache is None or isinstance(cache, DynamicCache)):
        return None
    batch, length, device = *inputs_embeds.shape[:2], inputs_embeds.device
    if attention_mask is None and cache is None:
        if position_ids is None:
            return {name: _of_rows(batch, length, window, device) for name, (_, window) in layers.items()}
        begins = document_begins(position_ids.expand(batch, -1))
        made = {window: block_mask(_with_window(begins, window)) for _, window in layers.values()}
        return {name: made[window] for name, (_, window) in layers.items()}
    begins = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
            return None
        attended = torch.nn.functional.pad(attention_mask.to(device).bool(), (1, 0))
        rises = attended[:, 1:] & ~attended[:, :-1]
        if bool((rises.sum(-1) > 1).any()):
            return None
        begins = rises.int().argmax(-1, keepdim=True)
    return {name: _of_cache(begins, length, window, cache, layer) for name, (layer, window) in layers.items()}


def document_begins(position_ids: Tensor) -> Tensor:
    """``[B, S]``: where in its row the document of each token begins, without waiting for the device."""
    index = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    begins = torch.zeros_like(index)
    begins[:, 1:] = index[:, 1:].where(position_ids.diff(dim=-1) != 1, 0)
    return begins.cummax(dim=-1).values


def block_mask(first: Tensor, keys: int | None = None, before: int = 0) -> BlockMask:
    """The mask of tokens that see the keys from ``first`` to their own.

    Args:
        first: ``[B, Q]``, the number of a key; it never falls in a row.
        keys: K (default: Q).
        before: how many keys there are before the first token's own.
    """
    length = first.shape[1]
    keys = length if keys is None else keys
    queries, blocks = (torch.arange(-(-count // BLOCK), device=first.device) * BLOCK for count in (length, keys))
    last = (queries + BLOCK - 1).clamp(max=length - 1)
    # of each block of queries, where the sight of its first token begins, and of its last
    widest, narrowest = first[:, queries, None], first[:, last, None]
    # a block that the rows do not fill is never whole: what lies behind their ends is nobody's
    filled = ((queries + BLOCK <= length)[:, None]) & (blocks + BLOCK <= keys)
    whole = filled & (blocks + BLOCK - 1 <= (queries + before)[:, None]) & (narrowest <= blocks)
    some = (blocks <= (last + before)[:, None]) & (widest < blocks + BLOCK) & ~whole
    first = first.to(torch.int32).contiguous()
    shift = torch.full((), before, dtype=torch.int32, device=first.device)  # a number would be compiled in

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first[row, query] <= key) & (key <= query)

    def sees_cached(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first[row, query] <= key) & (key <= query + shift)

    return BlockMask.from_kv_blocks(
        *_ordered(some[:, None]),
        *_ordered(whole[:, None]),
        BLOCK,
        mask_mod=sees_cached if before else sees,
        seq_lengths=(length, keys),
    )


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which, those first: ``[B, 1, N]``, ``[B, 1, N, M]``."""
    indices = dense.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return dense.sum(-1).to(torch.int32), indices.to(torch.int32).contiguous()


@lru_cache(maxsize=16)
def _of_rows(batch: int, length: int, window: int | None, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):  # or a training could not use it
        begins = torch.zeros(batch, length, dtype=torch.int64, device=device)
        return block_mask(_with_window(begins, window))


def _of_cache(begins: Tensor, length: int, window: int | None, cache: Cache | None, layer: int) -> BlockMask:
    """Of ``length`` tokens, of which those before ``begins`` ``[B, 1]`` are padding; a cache may have dropped keys."""
    seen, keys, dropped = 0, length, 0
    if cache is not None:
        seen = cache.get_query_offset(layer)
        keys, dropped = cache.get_mask_sizes(length, layer)
    first = _with_window(begins.expand(-1, length), window, seen)
    return block_mask((first - dropped).clamp(min=0), keys, seen - dropped)


def _with_window(begins: Tensor, window: int | None, seen: int = 0) -> Tensor:
    if window is None:
        return begins
    index = torch.arange(begins.shape[1], device=begins.device) + seen
    return begins.maximum(index - window + 1)
