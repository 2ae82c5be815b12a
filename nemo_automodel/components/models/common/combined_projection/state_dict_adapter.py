"""State dicts between Hugging Face's separate projections and the fused ones, exactly, both ways."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedConfig

from nemo_automodel.components.layout import GATE_UP, Fusion, Layout, interleaved, qkv_fusion
from nemo_automodel.components.models.common.combined_projection.combined_qkv import head_dim_of, kv_heads_of
from nemo_automodel.components.placement import local

OWN_ROWS = "_automodel_own_rows"
"""Attribute of a state dict whose fused tensors have their rows in the model's own order."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class CombinedProjectionStateDictAdapter:
    """Merges ``q_proj, k_proj, v_proj`` into ``qkv_proj`` and ``gate_proj, up_proj`` into ``gate_up_proj``, and back.

    It works on every key whose last projection name is one of these: weights, biases, and LoRA and DoRA tensors of the
    fused projections (``lora_A`` is shared by the parts; ``lora_B`` and the DoRA magnitude hold a row per output).
    A family whose checkpoints have other names, or keep rows in another order, says so in ``renames``, `qkv_rows`,
    `gate_up_rows` and `other_rows`; one with other transformations overrides `from_hf` and `to_hf`, and the loader and
    the exporter then go through them.

    Args:
        config: reads the head counts, ``head_dim``, ``hidden_size`` and ``tie_word_embeddings``.

    Attributes:
        fuses_gate_up: False in the adapter of a family with `PlainMLP`, whose ``up_proj`` stands alone.
        renames: pairs of dotted fragments, ours and the checkpoint's; see `Layout`.
    """

    fuses_gate_up: ClassVar[bool] = True
    renames: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        heads, kv_heads = config.num_attention_heads, kv_heads_of(config)
        self.qkv = self.qkv_rows(qkv_fusion(heads, kv_heads, head_dim_of(config)))
        gate_up = (self.gate_up_rows(GATE_UP),) if self.fuses_gate_up else ()
        self.layout = Layout((self.qkv, *gate_up, *self.other_rows()), self.renames)

    def qkv_rows(self, fusion: Fusion) -> Fusion:
        """How checkpoints keep query, key and value: `stored_as`, `concatenated`, `interleaved`; default: apart."""
        return fusion

    def gate_up_rows(self, fusion: Fusion) -> Fusion:
        """How checkpoints keep gate and up: `concatenated`, ...; default: apart."""
        return fusion

    def other_rows(self) -> tuple[Fusion, ...]:
        """Parameters beside these that checkpoints keep in another order: `reordered`; default: none."""
        return ()

    def from_hf(self, hf_state_dict: Mapping[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """Own state dict from a Hugging Face one (plain tensors or DTensors; the input is left alone).

        With ``tie_word_embeddings`` a missing ``lm_head.weight`` becomes the embedding, as one storage.

        Raises:
            KeyError: a part of a fused projection is missing.
            ValueError: shapes that do not fit the head counts, or LoRA parts that do not share their ``lora_A``.
        """
        located = {key: self.layout.locate(key) for key in hf_state_dict}
        state_dict: OrderedDict[str, Tensor] = OrderedDict()
        setattr(state_dict, OWN_ROWS, True)
        for key, place in located.items():
            if place.fusion is None:
                state_dict[place.own] = hf_state_dict[key]
            elif place.own not in state_dict:
                keys = list(self.layout.hf_keys(place.own))
                if absent := [name for name in keys if name not in hf_state_dict]:
                    raise KeyError(f"{place.own} is made of {', '.join(keys)}; missing: {', '.join(absent)}")
                parts = [hf_state_dict[name] for name in keys]
                state_dict[place.own] = (
                    self._shared(place.own, parts) if _is_shared(key) else self._interleave(place.fusion, parts)
                )
        if self.config.tie_word_embeddings and HEAD not in state_dict and EMBEDDING in state_dict:
            state_dict[HEAD] = state_dict[EMBEDDING]
        return state_dict

    def to_hf(
        self, state_dict: Mapping[str, Tensor], exclude_key_regex: str | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Hugging Face state dict from an own one: the exact inverse of `from_hf`.

        A head that is one storage with the embedding is left out, as in a Hugging Face checkpoint of a tied model.

        Args:
            state_dict: own state dict, or any part of one.
            exclude_key_regex: Hugging Face keys that it matches from their start are left out.
            **kwargs: accepted for adapters that override this method.

        Raises:
            ValueError: a fused tensor that does not hold a whole number of groups.
        """
        hf_state_dict: dict[str, Tensor] = {}
        tied = self.config.tie_word_embeddings and _same_storage(state_dict.get(HEAD), state_dict.get(EMBEDDING))
        for own, tensor in state_dict.items():
            if tied and own == HEAD:
                continue
            places = self.layout.hf_keys(own)
            fusion = next(iter(places.values())).fusion
            if fusion is None:
                hf_state_dict[next(iter(places))] = tensor
            elif _is_shared(own):
                hf_state_dict.update({key: tensor.clone() for key in places})
            else:
                hf_state_dict.update(zip(places, self._deinterleave(fusion, tensor), strict=True))
        if exclude_key_regex is not None:
            pattern = re.compile(exclude_key_regex)
            hf_state_dict = {key: tensor for key, tensor in hf_state_dict.items() if not pattern.match(key)}
        return hf_state_dict

    def _interleave_qkv(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows of q, k and v (weights or 1-D biases) grouped by KV head: ``[Q_group | K | V]`` per group."""
        return self.qkv.fuse((q, k, v))

    def _gather_1d_bias(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The whole of a sharded tensor, and the original to restore its placements from.

        The interleaved layout need not divide evenly over the shards, so rows are permuted on the whole tensor.
        """
        return (bias.full_tensor() if isinstance(bias, DTensor) else bias), bias

    def _restore_1d_bias(self, bias: Tensor, original: Tensor) -> Tensor:
        """Shard ``bias``, whole and equal on every rank, as ``original`` is (a plain ``original``: left whole)."""
        if not isinstance(original, DTensor):
            return bias
        # every rank holds the same values already: no broadcast
        return distribute_tensor(bias, original.device_mesh, original.placements, src_data_rank=None)

    def _interleave(self, fusion: Fusion, parts: list[Tensor]) -> Tensor:
        gathered = [self._gather_1d_bias(part) for part in parts]
        return self._restore_1d_bias(fusion.fuse([whole for whole, _ in gathered]), gathered[0][1])

    def _deinterleave(self, fusion: Fusion, fused: Tensor) -> list[Tensor]:
        whole, original = self._gather_1d_bias(fused)
        parts = [part.contiguous() for part in fusion.split(whole)]
        if whole.shape[0] == fusion.group:  # a single group's parts are views: an edit would reach the model
            parts = [part.clone() for part in parts]
        return [self._restore_1d_bias(part, original) for part in parts]

    def _shared(self, own: str, parts: list[Tensor]) -> Tensor:
        first, *others = parts
        if not all(torch.equal(first, other) for other in others):
            raise ValueError(
                f"{own}: the separate projections have different lora_A, which one fused lora_A cannot hold; "
                "load this adapter as separate projections (automodel trains and saves them that way)"
            )
        return first


class InterleavedRopeStateDictAdapter(CombinedProjectionStateDictAdapter):
    """For checkpoints whose RoPE turns neighbouring channels of queries and keys (GLM, Cohere, ERNIE 4.5).

    Attributes:
        partial: whether ``partial_rotary_factor`` says how many of a head's channels turn; otherwise all do.
    """

    partial: ClassVar[bool] = False

    def qkv_rows(self, fusion: Fusion) -> Fusion:
        share = self.config.rope_parameters.get("partial_rotary_factor", 1.0) if self.partial else 1.0
        return interleaved(fusion, int(head_dim_of(self.config) * share))


def _is_shared(key: str) -> bool:
    """LoRA's A reads the input: all parts of a fused projection share it. Everything else has a row per output."""
    return ".lora_A." in key or key.endswith(".lora_A")


def _same_storage(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape:
        return False
    a, b = map(local, (a, b))
    return a is b or (a.device.type != "meta" and a.data_ptr() == b.data_ptr())
