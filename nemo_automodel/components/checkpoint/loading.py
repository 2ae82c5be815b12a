"""Fill a model that was built on the meta device from a checkpoint, piece by piece, each rank its own shard."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from nemo_automodel.components.checkpoint.reading import CheckpointError, Scratch, TensorReader
from nemo_automodel.components.checkpoint.shards import Region, empty_local, with_local
from nemo_automodel.components.layout import Layout, PartKey
from nemo_automodel.components.problems import listed

READERS = 4
"""Pieces in flight."""

PIECE = 4 * 2**20
"""Bytes of a piece, the unit of reading: small enough for the cache where it takes a detour to be permuted or cast."""

_SHORT = 8  # rows: stretches that are shorter on average are not worth a read each


def load_parameters(
    model: nn.Module,
    reader: TensorReader,
    layout: Layout,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    tied: Mapping[str, str] | None = None,
    may_miss: Collection[str] = (),
    may_ignore: Collection[str] = (),
    elsewhere: Collection[str] = (),
) -> set[str]:
    """Give every parameter and persistent buffer of ``model`` its values from the checkpoint.

    Names, shapes and dtypes are checked before anything is read. Pieces of the tensors are read straight into the
    parameter, or permuted and cast on the way, so the host never holds more than the model and `READERS` pieces. Of a
    parameter that is a DTensor, of any placements, only this rank's shard is read and held.

    Args:
        model: its parameters may be on the meta device; they are replaced.
        reader: the checkpoint.
        layout: which rows of which own parameter a Hugging Face tensor fills.
        dtype: of floating-point parameters.
        device: where the parameters go.
        tied: own name -> the name it is tied to; one of the two may be missing.
        may_miss: regular expressions of own names that the checkpoint need not have.
        may_ignore: regular expressions of checkpoint keys that the model need not use.
        elsewhere: own names that other pipeline stages have; what fills them is left out, but for a tied parameter here
            that the checkpoint has under such a name.

    Returns:
        The own names that the checkpoint does not have (tied ones, and those in ``may_miss``): still on meta.

    Raises:
        CheckpointError: keys missing, unexpected, of another shape or stored in 8 bits, all named at once.
    """
    own = dict(model.state_dict(keep_vars=True))
    located = {key: layout.locate(key) for key in reader}
    # a fused name in the file would be rows in an order that nobody knows: not used
    located = {key: place for key, place in located.items() if key in layout.hf_keys(place.own)}
    partners = dict(tied or {}) | {source: target for target, source in (tied or {}).items()}
    stored = {place.own for place in located.values()}
    named = {p: name for name in own if (p := partners.get(name)) in elsewhere and p in stored and name not in stored}
    plan = {key: replace(place, own=named.get(place.own, place.own)) for key, place in located.items()}
    others = {key for key, place in plan.items() if place.own in elsewhere}
    plan = {key: place for key, place in plan.items() if place.own in own}
    missing = _check(own, plan, reader, layout, partners, may_miss, may_ignore, others)
    shards = {
        name: empty_local(own[name], dtype if own[name].is_floating_point() else own[name].dtype, device)
        for name in dict.fromkeys(place.own for place in plan.values())
    }
    scratch = Scratch()
    with ThreadPoolExecutor(READERS) as pool:
        pieces = (
            piece
            for key, place in plan.items()
            for piece in _pieces(key, place, own[place.own], shards[place.own], Region.of(own[place.own]), reader)
        )
        for _ in pool.map(lambda piece: piece.read(reader, scratch), pieces):
            pass  # the first error ends it
    for name, shard in shards.items():
        assign(model, name, with_local(own[name], shard))
    return missing


def assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value`` in the place of the parameter or buffer called ``name``."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        before = module._parameters[leaf]  # frozen ones stay frozen
        module._parameters[leaf] = nn.Parameter(value, requires_grad=before is not None and before.requires_grad)
    else:
        module._buffers[leaf] = value


@dataclass(frozen=True)
class _Piece:
    """Rows that lie together in a checkpoint's tensor, and where they go.

    Attributes:
        shard: this rank's memory for the parameter that takes them.
        own: its rows that take them, a regular stretch or their numbers.
        count: how many rows.
        start: the first element to read, counted in the whole tensor.
        row: elements of a whole row in the file, where the shard holds some of its columns; else 0.
        column: the first of those columns.
        order: of whole rows, the column in the file for each of the shard's, where the file's order is another.
    """

    key: str
    shard: Tensor
    own: slice | Tensor
    count: int
    start: int
    row: int
    column: int
    order: Tensor | None = None

    def read(self, reader: TensorReader, scratch: Scratch) -> None:
        if isinstance(self.own, slice) and not self.row and self.order is None:
            reader.read_into(self.shard[self.own], self.key, self.start)
            return
        # whole rows, in one call: a call per row costs more than the other ranks' columns, which share their pages
        dtype, tail = reader.dtype(self.key), (self.row,) if self.row else tuple(self.shard.shape[1:])
        rows = scratch.take(self.count * math.prod(tail), dtype).view(self.count, *tail)
        reader.read_into(rows, self.key, self.start)
        if self.row:
            rows = rows[:, self.column : self.column + self.shard.shape[1]]
        if self.order is not None:
            rows = rows.index_select(-1, self.order)
        if isinstance(self.own, slice):
            self.shard[self.own].copy_(rows)
        else:
            self.shard.index_copy_(0, self.own.to(self.shard.device), rows.to(self.shard.device, self.shard.dtype))


def _pieces(
    key: str, place: PartKey, parameter: Tensor, shard: Tensor, region: Region, reader: TensorReader
) -> Iterator[_Piece]:
    """Pieces that together bring this rank's share of the tensor ``key``."""
    if not shard.numel():
        return
    if not region.shape:  # a scalar
        yield _Piece(key, shard.view(1), slice(None), 1, 0, 0, 0)
        return
    shape, itemsize = reader.shape(key), reader.dtype(key).itemsize
    row = math.prod(shape[1:])
    cut = region.shape[1:] != shape[1:]
    order = None if place.fusion is None else place.fusion.hf_columns(shape[-1])
    if cut and (len(shape) != 2 or order is not None):
        raise NotImplementedError(f"{key}: {len(shape)} dims, sharded along another than the first")
    start, stop = region.offset[0], region.offset[0] + region.shape[0]
    if place.fusion is None:
        own, hf = torch.arange(stop - start), torch.arange(start, stop)
    else:
        own, hf = place.fusion.rows(place.part, start, stop, parameter.shape[0])
        if place.fusion.order_of(place.part) is not None:
            hf, by_file = hf.sort()
            own = own[by_file]
    step = max(1, PIECE // (row * itemsize))
    for stretch in _stretches(own, hf):
        for first in range(stretch.start, stretch.stop, step):
            taken = own[first : min(first + step, stretch.stop)]
            columns = (row, region.offset[1]) if cut else (0, 0)
            yield _Piece(key, shard, _as_slice(taken), len(taken), int(hf[first]) * row, *columns, order)


def _stretches(own: Tensor, hf: Tensor) -> Iterator[slice]:
    """Where both run on regularly; or, where ours hardly does (the file's order is another), the file's rows only."""
    together, steps = hf.diff() == 1, own.diff()
    regular = together & (steps == steps[:1])
    ends = [(~each).nonzero().flatten().add(1).tolist() for each in (regular, together)]
    bounds = ends[0] if len(own) >= _SHORT * (len(ends[0]) + 1) else ends[1]
    yield from (slice(a, b) for a, b in pairwise((0, *bounds, len(own))) if b > a)


def _as_slice(rows: Tensor) -> slice | Tensor:
    """Ascending row numbers as a slice where they are evenly spaced."""
    if len(rows) == 1:
        return slice(int(rows[0]), int(rows[0]) + 1)
    step = int(rows[1] - rows[0])
    return slice(int(rows[0]), int(rows[-1]) + 1, step) if step > 0 and (rows.diff() == step).all() else rows


def _check(
    own: Mapping[str, Tensor],
    plan: Mapping[str, PartKey],
    reader: TensorReader,
    layout: Layout,
    partners: Mapping[str, str],
    may_miss: Collection[str],
    may_ignore: Collection[str],
    others: Collection[str],
) -> set[str]:
    problems: list[str] = []
    unexpected = [key for key in reader if key not in plan and key not in others and not matches(key, may_ignore)]
    problems += _named("not used by this model", unexpected)

    absent = {name: [key for key in layout.hf_keys(name) if key not in plan] for name in own}
    absent |= {place.own: [] for key, place in plan.items() if key not in layout.hf_keys(place.own)}  # a tied one's
    excused = {
        name
        for name, keys in absent.items()
        if (keys and len(keys) == len(layout.hf_keys(name)) and (absent.get(partners.get(name, name)) == []))
        or (keys and matches(name, may_miss))
    }
    problems += _named("missing", [key for name, keys in absent.items() if name not in excused for key in keys])

    for key, place in plan.items():
        shape = tuple(own[place.own].shape)
        wanted = place.fusion.part_shape(shape, place.part) if place.fusion else shape
        if reader.shape(key) != wanted:
            problems.append(f"{key}: shape {list(reader.shape(key))} where the config asks for {list(wanted)}")
            continue
        stored, floating = reader.dtype(key), own[place.own].is_floating_point()
        if stored.is_floating_point != floating or (floating and stored.itemsize == 1):
            problems.append(f"{key}: stored as {stored}; quantized checkpoints are not read")
    refuse(reader, problems)
    return excused


def refuse(reader: TensorReader, problems: list[str]) -> None:
    """Raise a CheckpointError that lists the first of the problems and counts the rest; none of them: do nothing."""
    if problems:
        raise CheckpointError(f"{reader.path} does not fit the model:\n  {listed(problems)}")


def _named(what: str, keys: list[str]) -> list[str]:
    return [f"{key}: {what}" for key in keys]


def matches(key: str, patterns: Collection[str]) -> bool:
    """Whether any of the regular expressions is found in ``key``."""
    return any(re.search(pattern, key) for pattern in patterns)
