"""Fill a model that was built on the meta device from a checkpoint, piece by piece, each rank its own shard."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nemo_automodel.components.checkpoint.reading import CheckpointError, Scratch, TensorReader
from nemo_automodel.components.checkpoint.shards import Region, empty_local, with_local
from nemo_automodel.components.layout import Layout, PartKey, RowRun

READERS = 4
"""Pieces in flight."""

PIECE = 4 * 2**20
"""Bytes of a piece, the unit of reading: small enough for the cache where it takes a detour to be permuted or cast."""

_SHOWN = 8


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

    Returns:
        The own names that the checkpoint does not have (tied ones, and those in ``may_miss``): still on meta.

    Raises:
        CheckpointError: keys missing, unexpected, of another shape or stored in 8 bits, all named at once.
    """
    own = dict(model.state_dict(keep_vars=True))
    located = {key: layout.locate(key) for key in reader}
    # a fused name in the file would be rows in an order that nobody knows: not used
    plan = {key: place for key, place in located.items() if place.own in own and key in layout.hf_keys(place.own)}
    missing = _check(own, plan, reader, layout, tied or {}, may_miss, may_ignore)
    shards = {
        name: empty_local(own[name], dtype if own[name].is_floating_point() else own[name].dtype, device)
        for name in dict.fromkeys(place.own for place in plan.values())
    }
    scratch = Scratch()
    with ThreadPoolExecutor(READERS) as pool:
        pieces = (
            piece
            for key, place in plan.items()
            for piece in _pieces(key, place, shards[place.own], Region.of(own[place.own]), reader)
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
    """Some rows of a checkpoint's tensor and where they go.

    Attributes:
        target: ``[..., columns]``, rows in the order of the file.
        start: the first element to read, counted in the whole tensor.
        row: elements of a whole row in the file, where the target's are some of its columns; else 0.
        column: the first of those columns.
    """

    key: str
    target: Tensor
    start: int
    row: int
    column: int

    def read(self, reader: TensorReader, scratch: Scratch) -> None:
        if not self.row:
            reader.read_into(self.target, self.key, self.start)
            return
        # whole rows, in one call: a call per row costs more than the other ranks' columns, which share their pages
        count = self.target.shape[:-1].numel()
        rows = scratch.take(count * self.row, reader.dtype(self.key)).view(count, self.row)
        reader.read_into(rows, self.key, self.start)
        columns = rows[:, self.column : self.column + self.target.shape[-1]]
        self.target.copy_(columns.view(self.target.shape))


def _pieces(key: str, place: PartKey, shard: Tensor, region: Region, reader: TensorReader) -> Iterator[_Piece]:
    """Pieces that together bring this rank's share of the tensor ``key``."""
    if not shard.numel():
        return
    shape, itemsize = reader.shape(key), reader.dtype(key).itemsize
    row = math.prod(shape[1:])
    cut = region.shape[1:] != shape[1:]
    if cut and len(shape) != 2:
        raise NotImplementedError(f"{key}: {len(shape)} dims, sharded along another than the first")
    for run, view in _runs(place, shard, region):
        step = max(1, PIECE // (run.rows * row * itemsize))  # blocks of rows
        for first in range(0, view.shape[0], step):
            start = (run.hf + first * run.rows) * row
            yield _Piece(key, view[first : first + step], start, row if cut else 0, region.offset[1] if cut else 0)


def _runs(place: PartKey, shard: Tensor, region: Region) -> Iterator[tuple[RowRun, Tensor]]:
    """Runs of rows, and their place in the shard: ``[blocks, ...]``."""
    if not region.shape:  # a scalar
        yield RowRun(0, 0, 1, 1, 1), shard.view(1)
        return
    start, rows = region.offset[0], region.shape[0]
    if place.fusion is None:
        yield RowRun(0, start, rows, 1, 1), shard
        return
    for run in place.fusion.runs(place.part, start, start + rows):
        yield run, run.view(shard)


def _check(
    own: Mapping[str, Tensor],
    plan: Mapping[str, PartKey],
    reader: TensorReader,
    layout: Layout,
    tied: Mapping[str, str],
    may_miss: Collection[str],
    may_ignore: Collection[str],
) -> set[str]:
    problems: list[str] = []
    unexpected = [key for key in reader if key not in plan and not matches(key, may_ignore)]
    problems += _named("not used by this model", unexpected)

    absent = {name: [key for key in layout.hf_keys(name) if key not in plan] for name in own}
    partners = dict(tied) | {source: target for target, source in tied.items()}
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
        shown = problems[:_SHOWN] + ([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
        raise CheckpointError(f"{reader.path} does not fit the model:\n  " + "\n  ".join(shown))


def _named(what: str, keys: list[str]) -> list[str]:
    return [f"{key}: {what}" for key in keys]


def matches(key: str, patterns: Collection[str]) -> bool:
    """Whether any of the regular expressions is found in ``key``."""
    return any(re.search(pattern, key) for pattern in patterns)
