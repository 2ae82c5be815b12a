"""How fused parameters hold the rows of Hugging Face's separate ones: the one table, with each permutation's inverse.

Every piece of code that moves weights (state-dict adapters, the loader, the exporter, LoRA) reads these rules, so no
second copy of a layout exists. Both layouts of the library are one pattern, "take ``blocks[i]`` rows of part ``i`` in
turn until the parts are used up":

* ``qkv_proj``: ``blocks = (group_size * head_dim, head_dim, head_dim)`` gives ``[Q_group | K | V]`` per KV head;
* ``gate_up_proj``: ``blocks = (1, 1)`` gives ``gate_0, up_0, gate_1, up_1, ...``.

The number of groups is read off the tensor's shape, so the same rule serves a whole parameter and a tensor-parallel
shard of it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """One fused projection and the projections whose rows it holds.

    Attributes:
        fused: module name of the fused projection, such as ``"qkv_proj"``.
        parts: module names of the separate projections, in the order of their blocks.
        blocks: rows taken from each part in turn; ``sum(blocks)`` rows make one group.
    """

    fused: str
    parts: tuple[str, ...]
    blocks: tuple[int, ...]

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
        grouped = [part.unflatten(0, (-1, block)) for part, block in zip(parts, self.blocks, strict=True)]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, fused: Tensor, dim: int = 0) -> list[Tensor]:
        """The inverse of `fuse`, along ``dim`` (0 for weights, -1 for the projection's output).

        Raises:
            ValueError: when ``fused`` does not hold a whole number of groups.
        """
        dim = dim % fused.ndim
        grouped = fused.unflatten(dim, (self._groups_of(fused.shape[dim]), self.group))
        return [part.flatten(dim, dim + 1) for part in grouped.split(self.blocks, dim + 1)]

    def runs(self, part: str, start: int, stop: int) -> list["RowRun"]:
        """Where rows ``start`` to ``stop`` of the fused projection, a shard's, hold rows of ``part``.

        The cuts need not respect groups or blocks: a block that is cut is a run of its own.
        """
        index = self.parts.index(part)
        before, block = sum(self.blocks[:index]), self.blocks[index]
        first = max(0, -(-(start - before) // self.group))  # first and last + 1 of the groups whose block is whole
        last = max(first, (stop - before - block) // self.group + 1)
        runs = []
        for group, groups in ((first - 1, 1), (first, last - first), (last, 1)):
            row = group * self.group + before
            low, high = max(start, row, 0), min(stop, row + block) if groups == 1 else row + block
            if groups and group >= 0 and low < high:
                runs.append(RowRun(low - start, group * block + low - row, groups, high - low, self.group))
        return runs

    def part_view(self, fused: Tensor, part: str) -> Tensor:
        """The rows of ``part`` inside ``fused``, as a writable view ``[groups, block, ...]``."""
        index = self.parts.index(part)
        start = sum(self.blocks[:index])
        groups = self._groups_of(fused.shape[0])
        return fused.unflatten(0, (groups, self.group))[:, start : start + self.blocks[index]]

    def write_part(self, fused: Tensor, part: str, value: Tensor) -> None:
        """Copy ``value``, the separate projection's tensor, into its rows of ``fused`` (casting to its dtype).

        Raises:
            ValueError: ``value`` has another shape than `part_shape` says.
        """
        view = self.part_view(fused, part)
        if (wanted := self.part_shape(fused.shape, part)) != tuple(value.shape):
            raise ValueError(f"{part}: shape {list(value.shape)} where {self.fused} takes {list(wanted)}")
        view.copy_(value.unflatten(0, view.shape[:2]))

    def part_shape(self, fused: Sequence[int], part: str) -> tuple[int, ...]:
        """Shape of the separate projection's tensor, given the fused one's."""
        block = self.blocks[self.parts.index(part)]
        return (self._groups_of(fused[0]) * block, *fused[1:])

    def _groups_of(self, rows: int) -> int:
        if rows % self.group:
            raise ValueError(f"{self.fused}: {rows} rows are not a whole number of groups of {self.group}")
        return rows // self.group

    @staticmethod
    def _groups(part: Tensor, block: int) -> int | None:
        return None if part.shape[0] % block else part.shape[0] // block


@dataclass(frozen=True)
class RowRun:
    """Rows that lie together in a Hugging Face tensor, and where a shard of the own parameter holds them.

    Attributes:
        own: first row in the shard.
        hf: first row in the Hugging Face tensor; ``groups * rows`` of them follow in one piece.
        groups: blocks of ``rows`` rows each in the shard, ``step`` rows from one's start to the next's.
    """

    own: int
    hf: int
    groups: int
    rows: int
    step: int

    def view(self, shard: Tensor) -> Tensor:
        """The run's place in the shard ``[rows, ...]`` (contiguous), as a writable view ``[groups, rows, ...]``."""
        row = shard.stride(0)
        size, stride = (self.groups, self.rows, *shard.shape[1:]), (self.step * row, *shard.stride())
        return shard.as_strided(size, stride, shard.storage_offset() + self.own * row)


@dataclass(frozen=True)
class PartKey:
    """Where a Hugging Face tensor lives: the rows of ``part`` in the own parameter ``own``, or all (no ``fusion``)."""

    own: str
    part: str = ""
    fusion: Fusion | None = None


class Layout:
    """A model's table of fusions, and the key names on both sides."""

    def __init__(self, fusions: Sequence[Fusion]):
        self.fusions = tuple(fusions)
        self._by_part = {part: fusion for fusion in fusions for part in fusion.parts}
        self._by_fused = {fusion.fused: fusion for fusion in fusions}
        names = "|".join(re.escape(name) for name in (*self._by_part, *self._by_fused))
        # The last module name in a key decides: "model.layers.0.self_attn.q_proj" + ".lora_A.default.weight"
        self._split = re.compile(rf"^(?P<prefix>(?:.*\.)?)(?P<module>{names})(?P<tail>(?:\..*)?)$")

    def locate(self, hf_key: str) -> PartKey:
        """Which own parameter holds the tensor called ``hf_key`` in a Hugging Face checkpoint."""
        match = self._split.match(hf_key)
        fusion = self._by_part.get(match["module"]) if match else None
        if match is None or fusion is None:
            return PartKey(own=hf_key)
        return PartKey(match["prefix"] + fusion.fused + match["tail"], match["module"], fusion)

    def hf_keys(self, own_key: str) -> dict[str, PartKey]:
        """The Hugging Face keys whose tensors make up the own parameter ``own_key``, in block order."""
        match = self._split.match(own_key)
        fusion = self._by_fused.get(match["module"]) if match else None
        if match is None or fusion is None:
            return {own_key: PartKey(own=own_key)}
        return {f"{match['prefix']}{part}{match['tail']}": PartKey(own_key, part, fusion) for part in fusion.parts}

    def fusion_of(self, module_name: str) -> Fusion | None:
        """The fusion of a module such as ``"model.layers.0.mlp.gate_up_proj"``, None for any other module."""
        return self._by_fused.get(module_name.rpartition(".")[2])


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
