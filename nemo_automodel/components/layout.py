"""How fused parameters hold the rows of Hugging Face's tensors: the one table, with each permutation's inverse.

Every piece of code that moves weights (state-dict adapters, the loader, the exporter, LoRA) reads these rules, so no
second copy of a layout exists. Both layouts of the library are one pattern, "take ``blocks[i]`` rows of part ``i`` in
turn until the parts are used up":

* ``qkv_proj``: ``blocks = (group_size * head_dim, head_dim, head_dim)`` gives ``[Q_group | K | V]`` per KV head;
* ``gate_up_proj``: ``blocks = (1, 1)`` gives ``gate_0, up_0, gate_1, up_1, ...``.

The number of groups is read off the tensor's shape, so the same rule serves a whole parameter and a tensor-parallel
shard of it. Where a checkpoint keeps the rows of a part in another order, a `RowOrder` says in which.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Concatenated:
    """The checkpoint keeps everything of the first kind, then of the second; here ``blocks[i]`` rows of each in turn.

    ``[Q | K | V]`` of one tensor (Phi-3) with ``blocks = (group_size * head_dim, head_dim, head_dim)``, ``[gate | up]``
    with ``blocks = (1, 1)``.
    """

    blocks: tuple[int, ...]

    def hf_rows(self, rows: int) -> Tensor:
        """``[rows]``, int64: row ``i`` here is row ``hf_rows[i]`` in the checkpoint's tensor of so many rows."""
        groups = rows // sum(self.blocks)
        starts = [groups * sum(self.blocks[:i]) for i in range(len(self.blocks))]
        kinds = [
            start + torch.arange(groups * block).view(groups, block)
            for start, block in zip(starts, self.blocks, strict=True)
        ]
        return torch.cat(kinds, dim=1).flatten()


@dataclass(frozen=True)
class Interleaved:
    """The checkpoint's RoPE turns channels ``2i`` and ``2i + 1`` of a head, here ``i`` and ``rotary_dim / 2 + i``.

    Scores do not change when queries and keys are permuted alike, so half-split RoPE then computes the same.
    """

    head_dim: int
    rotary_dim: int

    def hf_rows(self, rows: int) -> Tensor:
        """As `Concatenated.hf_rows`."""
        even = torch.arange(0, self.rotary_dim, 2)
        head = torch.cat((even, even + 1, torch.arange(self.rotary_dim, self.head_dim)))
        return (torch.arange(0, rows, self.head_dim)[:, None] + head).flatten()


CPU = torch.device("cpu")

RowOrder = Concatenated | Interleaved
"""In which order a checkpoint keeps the rows of a part."""


@cache
def _order(order: RowOrder, rows: int, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """The order's ``hf_rows``, and its inverse, on ``device``: sent there once, for the host waits for it."""
    with torch.inference_mode(False):  # whoever asks first, the answer is for backward passes too
        if device != CPU:
            hf, inverse = _order(order, rows)
            return hf.to(device), inverse.to(device)
        hf = order.hf_rows(rows)
        return hf, torch.argsort(hf)


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """One fused projection and the Hugging Face tensors whose rows it holds.

    Attributes:
        fused: module name of the fused projection, such as ``"qkv_proj"``.
        parts: module names in the checkpoint, in the order of their blocks.
        blocks: rows taken from each part in turn; ``sum(blocks)`` rows make one group.
        orders: for each part how the checkpoint orders its rows, None where as here; empty: all as here.
        columns: how the checkpoint orders the last dimension of every part; None: as here.
    """

    fused: str
    parts: tuple[str, ...]
    blocks: tuple[int, ...]
    orders: tuple[RowOrder | None, ...] = ()
    columns: RowOrder | None = None

    @property
    def group(self) -> int:
        """Rows of one group of the fused projection."""
        return sum(self.blocks)

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        """Interleave the parts' rows: tensors ``[groups * blocks[i], ...]`` -> ``[groups * group, ...]``.

        Raises:
            ValueError: when the parts do not hold the same whole number of groups.
        """
        groups = {self._groups(part, block) for part, block in zip(parts, self.blocks, strict=True)}
        if len(groups) != 1 or None in groups:
            rows = ", ".join(f"{name} {part.shape[0]}" for name, part in zip(self.parts, parts, strict=True))
            raise ValueError(f"{self.fused} takes rows in blocks of {self.blocks} from {self.parts}; got rows: {rows}")
        ordered = [self._ordered(part, name) for part, name in zip(parts, self.parts, strict=True)]
        grouped = [part.unflatten(0, (-1, block)) for part, block in zip(ordered, self.blocks, strict=True)]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, fused: Tensor, dim: int = 0) -> list[Tensor]:
        """The inverse of `fuse`, along ``dim`` (0 for weights, -1 for the projection's output).

        Raises:
            ValueError: when ``fused`` does not hold a whole number of groups.
        """
        dim = dim % fused.ndim
        grouped = fused.unflatten(dim, (self._groups_of(fused.shape[dim]), self.group))
        parts = [part.flatten(dim, dim + 1) for part in grouped.split(self.blocks, dim + 1)]
        return [self._restored(part, name, dim) for part, name in zip(parts, self.parts, strict=True)]

    def rows(self, part: str, start: int, stop: int, total: int) -> tuple[Tensor, Tensor]:
        """Where rows ``start`` to ``stop`` of the fused projection of ``total`` rows, a shard's, hold rows of ``part``.

        The cuts need not respect groups or blocks.

        Returns:
            Two int64 tensors of one length: rows of the shard, ascending, and the rows of the checkpoint's tensor
            that belong there.
        """
        own, hf = _rows(self, part, total)
        low, high = torch.searchsorted(own, torch.tensor([start, stop])).tolist()
        return own[low:high] - start, hf[low:high]

    def read_part(self, fused: Tensor, part: str) -> Tensor:
        """The checkpoint's tensor of ``part``, out of ``fused``."""
        return self._restored(self.view(fused, part).flatten(0, 1), part)

    def write_part(self, fused: Tensor, part: str, value: Tensor) -> None:
        """Copy ``value``, the checkpoint's tensor, into its rows of ``fused`` (casting to its dtype).

        Raises:
            ValueError: ``value`` has another shape than `part_shape` says.
        """
        view = self.view(fused, part)
        if (wanted := self.part_shape(fused.shape, part)) != tuple(value.shape):
            raise ValueError(f"{part}: shape {list(value.shape)} where {self.fused} takes {list(wanted)}")
        view.copy_(self._ordered(value, part).unflatten(0, view.shape[:2]))

    def part_shape(self, fused: Sequence[int], part: str) -> tuple[int, ...]:
        """Shape of the checkpoint's tensor, given the fused one's."""
        block = self.blocks[self.parts.index(part)]
        return (self._groups_of(fused[0]) * block, *fused[1:])

    def from_stored(self, rows: Tensor, part: str) -> Tensor:
        """``rows``, one for each of ``part`` and in the checkpoint's order, in the order of here."""
        order = self.order_of(part)
        return rows if order is None else rows.index_select(0, _order(order, len(rows), rows.device)[0])

    def to_stored(self, rows: Tensor, part: str) -> Tensor:
        """The inverse of `from_stored`."""
        order = self.order_of(part)
        return rows if order is None else rows.index_select(0, _order(order, len(rows), rows.device)[1])

    def order_of(self, part: str) -> RowOrder | None:
        """How the checkpoint orders the rows of ``part``; None: as here."""
        return self.orders[self.parts.index(part)] if self.orders else None

    def view(self, fused: Tensor, part: str) -> Tensor:
        """The rows of ``part`` inside ``fused``, in the order of here, as a writable view ``[groups, block, ...]``."""
        index = self.parts.index(part)
        start = sum(self.blocks[:index])
        groups = self._groups_of(fused.shape[0])
        return fused.unflatten(0, (groups, self.group))[:, start : start + self.blocks[index]]

    def rows_between(self, part: str) -> tuple[int, int, int]:
        """Rows of ``part`` that stay together, from one such block to the next, and before the first."""
        index = self.parts.index(part)
        return self.blocks[index], self.group, sum(self.blocks[:index])

    def _ordered(self, value: Tensor, part: str) -> Tensor:
        value = self.from_stored(value, part)
        if self.columns is not None:
            value = value.index_select(-1, _order(self.columns, value.shape[-1], value.device)[0])
        return value

    def _restored(self, value: Tensor, part: str, dim: int = 0) -> Tensor:
        if (order := self.order_of(part)) is not None:
            value = value.index_select(dim, _order(order, value.shape[dim], value.device)[1])
        if self.columns is not None:
            value = value.index_select(-1, _order(self.columns, value.shape[-1], value.device)[1])
        return value

    def hf_columns(self, columns: int) -> Tensor | None:
        """Of the checkpoint's tensor, the column that belongs in each of so many here; None: the same one."""
        return None if self.columns is None else _order(self.columns, columns)[0]

    def _groups_of(self, rows: int) -> int:
        if rows % self.group:
            raise ValueError(f"{self.fused}: {rows} rows are not a whole number of groups of {self.group}")
        return rows // self.group

    @staticmethod
    def _groups(part: Tensor, block: int) -> int | None:
        return None if part.shape[0] % block else part.shape[0] // block


@cache
def _rows(fusion: Fusion, part: str, total: int) -> tuple[Tensor, Tensor]:
    """`Fusion.rows` of the whole parameter."""
    index = fusion.parts.index(part)
    before, block = sum(fusion.blocks[:index]), fusion.blocks[index]
    own = (torch.arange(0, total, fusion.group)[:, None] + before + torch.arange(block)).flatten()
    order = fusion.order_of(part)
    return own, torch.arange(len(own)) if order is None else _order(order, len(own))[0]


@dataclass(frozen=True)
class PartKey:
    """Where a Hugging Face tensor lives: the rows of ``part`` in the own parameter ``own``, or all (no ``fusion``)."""

    own: str
    part: str = ""
    fusion: Fusion | None = None


class Layout:
    """A model's table of fusions, and the names on both sides.

    Args:
        fusions: the fused projections.
        renames: pairs of dotted fragments, ours and the checkpoint's: ``("mlp.up_proj", "mlp.c_fc")``. On the way out
            they are applied in this order, on the way in in the reverse one. Names of parts are the checkpoint's and
            are not renamed, but the path before them is.
    """

    def __init__(self, fusions: Sequence[Fusion], renames: Sequence[tuple[str, str]] = ()):
        self.fusions = tuple(fusions)
        self.renames = tuple(renames)
        self._by_part = {part: fusion for fusion in fusions for part in fusion.parts}
        self._by_fused = {fusion.fused: fusion for fusion in fusions}
        names = "|".join(re.escape(name) for name in (*self._by_part, *self._by_fused))
        # The last module name in a key decides: "model.layers.0.self_attn.q_proj" + ".lora_A.default.weight"
        self._split = re.compile(rf"^(?P<prefix>(?:.*\.)?)(?P<module>{names})(?P<tail>(?:\..*)?)$")

    @property
    def ambiguous(self) -> bool:
        """Whether a name on both sides means rows in two orders, so that a state dict does not show whose it is."""
        own_name = [fusion for fusion in self.fusions if fusion.parts == (fusion.fused,)]
        return any(fusion.order_of(fusion.fused) or fusion.columns for fusion in own_name)

    def locate(self, hf_key: str) -> PartKey:
        """Which own parameter holds the tensor called ``hf_key`` in a Hugging Face checkpoint."""
        match = self._split.match(hf_key)
        fusion = self._by_part.get(match["module"]) if match else None
        if match is None or fusion is None:
            return PartKey(own=self._own(hf_key))
        return PartKey(self._own(match["prefix"]) + fusion.fused + match["tail"], match["module"], fusion)

    def hf_keys(self, own_key: str) -> dict[str, PartKey]:
        """The Hugging Face keys whose tensors make up the own parameter ``own_key``, in block order."""
        match = self._split.match(own_key)
        fusion = self._by_fused.get(match["module"]) if match else None
        if match is None or fusion is None:
            return {self._hf(own_key): PartKey(own=own_key)}
        prefix = self._hf(match["prefix"])
        return {f"{prefix}{part}{match['tail']}": PartKey(own_key, part, fusion) for part in fusion.parts}

    def stored_name(self, name: str) -> str:
        """What checkpoints call a tensor or module that transformers' class calls ``name``, mostly the same.

        GPT-NeoX's class calls its head ``lm_head``, as here, and its checkpoints ``embed_out``.
        """
        place = self.locate(name)
        return next(key for key, each in self.hf_keys(place.own).items() if each.part == place.part)

    def fusion_of(self, module_name: str) -> Fusion | None:
        """The fusion of a module such as ``"model.layers.0.mlp.gate_up_proj"``, None for any other module."""
        return self._by_fused.get(module_name.rpartition(".")[2])

    def _hf(self, name: str) -> str:
        for own, hf in self.renames:
            name = _replaced(name, own, hf)
        return name

    def _own(self, name: str) -> str:
        for own, hf in reversed(self.renames):
            name = _replaced(name, hf, own)
        return name


def _replaced(name: str, old: str, new: str) -> str:
    """``name`` with the dotted fragment ``old`` replaced, where it stands between dots or at an end."""
    return re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", lambda _: new, name, count=1)


def qkv_fusion(num_attention_heads: int, num_key_value_heads: int, head_dim: int) -> Fusion:
    """Rows of ``qkv_proj``, grouped by KV head: ``[Q_group | K | V]`` per group.

    Raises:
        ValueError: when the query heads do not divide into the KV heads.
    """
    if num_key_value_heads < 1 or num_attention_heads % num_key_value_heads:
        raise ValueError(
            f"num_attention_heads={num_attention_heads} is not a multiple of num_key_value_heads={num_key_value_heads}"
        )
    group_size = num_attention_heads // num_key_value_heads
    return Fusion(
        fused="qkv_proj",
        parts=("q_proj", "k_proj", "v_proj"),
        blocks=(group_size * head_dim, head_dim, head_dim),
    )


GATE_UP = Fusion(fused="gate_up_proj", parts=("gate_proj", "up_proj"), blocks=(1, 1))
"""Rows of ``gate_up_proj``: ``gate_0, up_0, gate_1, up_1, ...``."""


def stored_as(fusion: Fusion, name: str) -> Fusion:
    """``fusion`` for checkpoints that hold its rows in one tensor, in the order of here (GPT-NeoX, Falcon)."""
    return Fusion(fused=fusion.fused, parts=(name,), blocks=(fusion.group,))


def concatenated(fusion: Fusion, name: str) -> Fusion:
    """``fusion`` for checkpoints that hold its parts in one tensor, one after the other (Phi-3, GLM)."""
    return Fusion(fused=fusion.fused, parts=(name,), blocks=(fusion.group,), orders=(Concatenated(fusion.blocks),))


def interleaved(fusion: Fusion, rotary_dim: int) -> Fusion:
    """``qkv_proj`` for checkpoints whose RoPE turns neighbouring channels (GLM, Cohere)."""
    turned = Interleaved(fusion.blocks[1], rotary_dim)
    return replace(fusion, orders=(turned, turned, None))


def reordered(name: str, columns: RowOrder) -> Fusion:
    """A parameter that checkpoints hold under the name it has here, the columns of its rows in another order."""
    return Fusion(fused=name, parts=(name,), blocks=(1,), columns=columns)
