"""Attention over packed documents without a mask, by torch's ``varlen_attn`` (FlashAttention-2, arXiv:2307.08691).

Nothing is computed between documents: a row of eight documents costs an eighth of a whole one. Where documents begin is
found once per forward pass of the backbone, and is what its layers get for a mask.
Shapes: B batch, S sequence, H query heads, K key/value heads, D head_dim, N documents.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen as torch_varlen
from transformers import AttentionInterface, AttentionMaskInterface

VARLEN = "varlen"
"""The name, among transformers' attention implementations too."""

WIDEST = 256
"""The largest head_dim that FlashAttention takes; it must be a multiple of 8."""

# torch 2.11 takes fewer key heads without being told; later versions want to be
_GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(torch_varlen.varlen_attn).parameters else {}


class Gap(NamedTuple):
    """Something that this attention does not have, and the attention that does, by `BackendConfig.attn`."""

    what: str
    instead: str = "'sdpa' or 'flex'"


CACHE = Gap("cache of keys and values (give use_cache=False, or generate with another attention)", "'sdpa'")


class Documents(NamedTuple):
    """Where the documents of a batch begin, its rows laid end to end.

    Attributes:
        bounds: int32, ``[N + 1]``: each one's first token, and how many tokens there are.
        longest: tokens in the longest document, or more.
    """

    bounds: Tensor
    longest: int

    @classmethod
    def of(cls, position_ids: Tensor) -> "Documents":
        """Of positions ``[B, S]`` that do not go on from one token to the next where a document begins.

        On the CPU ``longest`` is exact. On a GPU the host waits once, to hear how many documents there are.
        """
        starts = torch.ones_like(position_ids, dtype=torch.bool)
        starts[:, 1:] = position_ids.diff(dim=-1) != 1
        bounds = F.pad(starts.flatten().nonzero().squeeze(1), (0, 1), value=starts.numel()).int()
        known = position_ids.device.type == "cpu"
        return cls(bounds, int(bounds.diff().max()) if known else position_ids.shape[-1])

    @classmethod
    def rows(cls, batch: int, length: int, device: torch.device) -> "Documents":
        """One in each row."""
        return cls(torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device), length)

    def as_inputs(self) -> dict[str, Any]:
        """What a forward pass takes instead of looking for documents itself, under transformers' names."""
        return {"cu_seq_lens_q": self.bounds, "max_length_q": self.longest}


def gap(attention: Any) -> Gap | None:
    """What the layer (a `DecoderAttention`) needs and does not find here; None where nothing is missing."""
    softcap, dropout, head_dim = attention.softcap.get("softcap"), attention.attention_dropout, attention.head_dim
    missing = {
        Gap(f"softcap on the scores, as this model needs ({softcap})", "'flex'"): bool(softcap),
        Gap(f"dropout of attention weights ({dropout})", "'sdpa', or set attention_dropout=0.0"): bool(dropout),
        Gap(f"head_dim of {head_dim}, only multiples of 8 up to {WIDEST}"): head_dim % 8 or head_dim > WIDEST,
    }
    return next((each for each, missed in missing.items() if missed), None)


def device_gap(device: torch.device, dtype: torch.dtype) -> Gap | None:
    """Why it does not run there; None where it does."""
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return None
    return Gap(
        f"kernel for {str(dtype).removeprefix('torch.')} on {device.type}, only for bfloat16 and float16 on CUDA"
    )


def refuse(missing: Gap | None) -> None:
    """Raise a ValueError that names what is ``missing``, and the way out; None: do nothing."""
    if missing is not None:
        raise ValueError(f"attention 'varlen' has no {missing.what}: use backend.attn={missing.instead}")


def documents_of_batch(
    inputs_embeds: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    cached: bool,
    given: Mapping[str, Any],
) -> Documents:
    """The documents of one forward pass.

    Args:
        inputs_embeds: ``[B, S, hidden]``.
        attention_mask: None, or ``[B, S]`` with padding on the right only, which no token sees.
        position_ids: ``[B or 1, S]``, starting again where a document begins; None: a row is a document.
        cached: whether there is a cache to read from.
        given: may have what `Documents.as_inputs` returns, made on the host, which then does not wait for the device.

    Raises:
        ValueError: what this attention does not have, by name, and what does.
    """
    batch, length = inputs_embeds.shape[:2]
    refuse(device_gap(inputs_embeds.device, inputs_embeds.dtype))
    refuse(CACHE if cached else None)
    refuse(_mask_gap(attention_mask))
    if position_ids is None and given.get("cu_seq_lens_q") is None:
        return Documents.rows(batch, length, inputs_embeds.device)
    return _documents(batch, length, position_ids, given)


def varlen_attention_forward(
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
    """Causal attention inside each document, under transformers' interface.

    Args:
        module: the layer.
        query: ``[B, H, S, D]``.
        key: ``[B, K, S, D]``.
        value: ``[B, K, S, D]``.
        attention_mask: the documents; None, as transformers' own classes give it, finds them in ``position_ids``.
        scaling: factor on the scores.
        dropout: must be 0.
        sliding_window: tokens that a token sees, its own included.
        softcap: must be None.
        position_ids: ``[B or 1, S]``.
        **kwargs: may have what `Documents.as_inputs` returns; other implementations take more.

    Returns:
        The output ``[B, S, H, D]``, and no weights.
    """
    batch, _, length, _ = query.shape
    refuse(device_gap(query.device, query.dtype))
    refuse(Gap("softcap on the scores", "'flex'") if softcap else None)
    refuse(Gap("dropout of attention weights", "'sdpa'") if dropout else None)
    refuse(CACHE if key.shape[2] != length else None)
    refuse(None if getattr(module, "is_causal", True) else Gap("attention to later tokens"))
    if not isinstance(attention_mask, Documents):
        refuse(_mask_gap(attention_mask))
        attention_mask = _documents(batch, length, position_ids, kwargs)
    bounds, longest = attention_mask
    attend: Any = torch_varlen.varlen_attn
    output: Tensor = attend(
        *(heads.transpose(1, 2).flatten(0, 1) for heads in (query, key, value)),
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **_GQA,
    )
    return output.unflatten(0, (batch, length)), None


def _documents(batch: int, length: int, position_ids: Tensor | None, given: Mapping[str, Any]) -> Documents:
    if given.get("cu_seq_lens_q") is not None:
        return Documents(given["cu_seq_lens_q"], int(given.get("max_length_q") or length))
    if position_ids is None:
        raise ValueError("attention 'varlen' finds documents in position_ids, which this model does not pass on to it")
    return Documents.of(position_ids.expand(batch, -1))


def _mask_gap(attention_mask: Any) -> Gap | None:
    """What of the mask is missing here; padding on the right needs nothing."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return Gap("masks ready made, only position_ids that start again")
    attended = attention_mask.bool()
    if bool((attended[:, 1:] <= attended[:, :-1]).all()):
        return None
    return Gap("attention_mask with padding on the left or in between (on the right it is fine)")


def _no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """What transformers' own classes get for a mask."""
    refuse(_mask_gap(attention_mask))


AttentionInterface.register(VARLEN, varlen_attention_forward)
AttentionMaskInterface.register(VARLEN, _no_mask)  # without one, transformers would drop any mask unseen
