"""Attention over packed documents without a mask, by torch's ``varlen_attn`` (FlashAttention-2, arXiv:2307.08691).

Nothing is computed between documents: a row of eight documents costs an eighth of a whole one. Where documents begin is
found once per forward pass of the backbone, and is what its layers get for a mask.
Shapes: B batch, S sequence, H query heads, K key/value heads, D head_dim, N documents.
"""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen as torch_varlen
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from nemo_automodel.components.models.common.capabilities import BY_IMPLEMENTATION, Capability, Need, refuse

VARLEN = "varlen"
"""The name, among transformers' attention implementations too."""

TE = "te"
"""That of Transformer Engine's, which is given documents as this one is."""

FOR_A_MASK = (VARLEN, TE)
"""Attentions whose layers get the documents for a mask."""

# torch 2.11 takes fewer key heads without being told; later versions want to be
_GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(torch_varlen.varlen_attn).parameters else {}


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
        bounds, longest = self
        return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def takes_bounds(implementation: str | None) -> bool:
    """Whether the attention of that name, transformers', tells packed documents apart by `Documents`.

    A kernel of the Hub with "flash" in its name does, as transformers has it.
    """
    capability = BY_IMPLEMENTATION.get(implementation)
    return "flash" in (implementation or "") if capability is None else capability.has.get("packing") == "bounds"


def documents_of_batch(
    model: PreTrainedModel,
    inputs_embeds: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    cached: bool,
    given: Mapping[str, Any],
) -> Documents | None:
    """The documents of one forward pass, for attention that takes their bounds; None where a mask says it all.

    Args:
        model: whose attention it is for.
        inputs_embeds: ``[B, S, hidden]``.
        attention_mask: None, or ``[B, S]``.
        position_ids: ``[B or 1, S]``, starting again where a document begins; None: a row is a document.
        cached: whether there is a cache to read from.
        given: may have what `Documents.as_inputs` returns, made on the host, which then does not wait for the device.

    Raises:
        ValueError: what this attention does not have, by name, and what does.
    """
    implementation = model.config._attn_implementation
    capability = BY_IMPLEMENTATION.get(implementation)
    backward = _trains_where_it_cannot(capability, model, inputs_embeds.device)
    asked = _asked_of_mask(capability, attention_mask)
    refuse(capability, Need.of(inputs_embeds, cache=cached, backward=backward, **asked))
    if not takes_bounds(implementation):
        return None
    if implementation not in FOR_A_MASK and (cached or attention_mask is not None):
        return None  # FlashAttention's own way with padding and caches
    batch, length = inputs_embeds.shape[:2]
    if position_ids is None and given.get("cu_seq_lens_q") is None:
        # with positions, which some layers use themselves, the packages' way would look for documents in each of them
        told = implementation in FOR_A_MASK or model.spec.rope.query_growth is not None  # type: ignore[union-attr]
        return Documents.rows(batch, length, inputs_embeds.device) if told else None
    return _documents(batch, length, position_ids, given)


def documents_seen(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Documents | Tensor | None,
    position_ids: Tensor | None,
    given: Mapping[str, Any],
    **need: Any,
) -> Documents:
    """The documents that a layer is to attend in, by the attention called ``name``, under transformers' interface.

    Args:
        name: one of `FOR_A_MASK`.
        module: the layer.
        query: ``[B, H, S, D]``.
        key: ``[B, K, S, D]``.
        attention_mask: the documents; None, as transformers' own classes give it, finds them in ``position_ids``.
        position_ids: ``[B or 1, S]``.
        given: may have what `Documents.as_inputs` returns.
        **need: what else the layer asks of the attention, as fields of `Need`.

    Raises:
        ValueError: what this attention does not have, by name, and what does.
    """
    own = BY_IMPLEMENTATION[name]
    cache, later = key.shape[2] != query.shape[2], not getattr(module, "is_causal", True)
    refuse(own, Need.of(query, head_dim=query.shape[-1], cache=cache, later=later, **need))
    if isinstance(attention_mask, Documents):
        return attention_mask
    refuse(own, Need(**_asked_of_mask(own, attention_mask)))
    return _documents(len(query), query.shape[2], position_ids, given)


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
    need = {"softcap": softcap or None, "dropout": dropout}
    bounds, longest = documents_seen(VARLEN, module, query, key, attention_mask, position_ids, kwargs, **need)
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
    return output.unflatten(0, (len(query), -1)), None


def _documents(batch: int, length: int, position_ids: Tensor | None, given: Mapping[str, Any]) -> Documents:
    if given.get("cu_seq_lens_q") is not None:
        return Documents(given["cu_seq_lens_q"], int(given.get("max_length_q") or length))
    if position_ids is None:
        raise ValueError("documents are found in position_ids, which this model does not pass on to its attention")
    return Documents.of(position_ids.expand(batch, -1))


def _trains_where_it_cannot(capability: Capability | None, model: nn.Module, device: torch.device) -> bool:
    """Parameters are looked at only where it matters."""
    on = None if capability is None else capability.on_device(device)
    if on is None or on.backward or not torch.is_grad_enabled():
        return False
    return any(parameter.requires_grad for parameter in model.parameters())


def _asked_of_mask(capability: Capability | None, attention_mask: Any) -> dict[str, Any]:
    """What a mask needs, as fields of `Need`; padding on the right needs nothing, and the rest is asked for where it
    would be refused: the host waits for the answer."""
    if capability is None or attention_mask is None:
        return {}
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return {"mask": True}
    if "left_padding" in capability.has:
        return {}
    attended = attention_mask.bool()
    return {"left_padding": not bool((attended[:, 1:] <= attended[:, :-1]).all())}


def no_mask(name: str, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """What transformers' own classes get for a mask, with the attention called ``name``."""
    own = BY_IMPLEMENTATION[name]
    refuse(own, Need(**_asked_of_mask(own, attention_mask)))


AttentionInterface.register(VARLEN, varlen_attention_forward)
# without one, transformers would drop any mask unseen
AttentionMaskInterface.register(VARLEN, partial(no_mask, VARLEN))
