"""A safetensors checkpoint as a table of tensors that are read one at a time."""

import json
import math
import os
import reprlib
import stat
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
# what safetensors knows besides: such a tensor may lie in the file as long as nobody asks for it
_BITS = {name: 8 * dtype.itemsize for name, dtype in _DTYPES.items()} | {
    "C64": 64,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}

_MOST_JSON = 100_000_000
"""Bytes of a header or an index: the limit of the safetensors format."""

_INT64_MAX = 2**63 - 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as it is; the message names the file, the tensor and what is wrong."""


class TensorReader(Protocol):
    """What a model is loaded from: a table of tensors, read whole or in ranges. Threads may read at the same time."""

    path: Path

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, key: str) -> bool: ...

    def __len__(self) -> int: ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the tensor ``key``."""
        ...

    def dtype(self, key: str) -> torch.dtype:
        """Dtype that `read` gives."""
        ...

    def read(self, key: str) -> Tensor:
        """The tensor ``key`` on the CPU, in memory of its own.

        Raises:
            CheckpointError: the file cannot be read any more.
        """
        value = torch.empty(self.shape(key), dtype=self.dtype(key))
        self.read_into(value, key)
        return value

    def read_into(self, target: Tensor, key: str, start: int = 0) -> None:
        """Fill ``target`` with ``target.numel()`` elements of ``key``, in row-major order from ``start`` on."""
        ...


@dataclass(frozen=True)
class _Stored:
    """Where the bytes of a tensor lie."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Scratch(threading.local):
    """Memory of each thread, kept: the allocator would ask the system for it again at every read."""

    _held: Tensor | None = None

    def take(self, size: int, dtype: torch.dtype) -> Tensor:
        """``[size]``, not filled, valid until the thread takes some again."""
        if self._held is None or self._held.nbytes < size * dtype.itemsize:
            self._held = torch.empty(size * dtype.itemsize, dtype=torch.uint8)
        return self._held[: size * dtype.itemsize].view(dtype)


class SafetensorsReader(TensorReader):
    """Names, shapes, dtypes and values of the tensors in a checkpoint folder or a single ``.safetensors`` file.

    Files are read (not mapped), so the process holds what it asked for and nothing else. They stay open, so that a
    file replaced meanwhile is still read as it was. Reading from several threads is safe.

    Every header is checked by this class and by the safetensors library before anything is read, and what a file says
    of itself is compared with its size, so no input makes the process allocate more than a file holds.

    Args:
        path: a folder with ``model.safetensors`` or ``model.safetensors.index.json``, or one file. It may be a symbolic
            link; links inside it may lead to files inside it, or to the ``blobs`` of the same repository in the Hub's
            cache.
        check_finite: refuse NaN and infinity in what is read.

    Raises:
        CheckpointError: no safetensors there; a file that is missing, unreadable, not a regular file, damaged or
            linked from elsewhere; an index that disagrees with its files; a tensor that two files hold.
    """

    def __init__(self, path: str | Path, *, check_finite: bool = False):
        self.path = Path(path)
        self.check_finite = check_finite
        self._descriptors: dict[Path, int] = {}
        self._scratch = Scratch()
        weakref.finalize(self, _close, self._descriptors)
        if os.path.isfile(self.path):
            self._stored = self._open(self.path)
        elif os.path.lexists(self.path / SINGLE):  # before the index, as transformers has it
            self._stored = self._open(_inside(self.path, SINGLE))
        elif os.path.lexists(self.path / INDEX):
            self._stored = self._open_indexed(_inside(self.path, INDEX))
        else:
            raise CheckpointError(self._why_nothing_was_found())

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __contains__(self, key: str) -> bool:
        return key in self._stored

    def __len__(self) -> int:
        return len(self._stored)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the tensor ``key``."""
        return self._stored[key].shape

    def file(self, key: str) -> Path:
        """The file that holds the tensor ``key``."""
        return self._stored[key].file

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of the tensor ``key``.

        Raises:
            CheckpointError: a dtype this library does not read.
        """
        stored = self._stored[key]
        if stored.dtype not in _DTYPES:
            raise CheckpointError(f"{stored.file}: tensor {key!r} has dtype {stored.dtype}, which is not read here")
        return _DTYPES[stored.dtype]

    def read_into(self, target: Tensor, key: str, start: int = 0) -> None:
        """Fill ``target`` with ``target.numel()`` elements of the tensor ``key``, in row-major order from ``start`` on.

        A contiguous target on the CPU is read in place; one of other strides, of another dtype or on another device
        costs the host a copy of its size.

        Raises:
            CheckpointError: the file cannot be read any more, or holds NaN or infinity where that is checked.
            ValueError: a range that does not lie in the tensor.
        """
        stored, dtype = self._stored[key], self.dtype(key)
        check_range(target, key, start, stored.shape)
        in_place = target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()
        buffer = target.detach() if in_place else self._scratch.take(target.numel(), dtype).view(target.shape)
        rest = buffer.view(-1).view(torch.uint8).numpy().data
        offset = stored.offset + start * dtype.itemsize
        while rest:
            try:
                count = os.preadv(self._descriptors[stored.file], [rest], offset)
            except OSError as error:
                raise CheckpointError(f"{stored.file}: tensor {key!r} cannot be read: {error}") from error
            if count == 0:
                raise CheckpointError(f"{stored.file}: tensor {key!r} ends too early; was the file cut meanwhile?")
            rest, offset = rest[count:], offset + count
        if self.check_finite:
            refuse_non_finite(buffer, stored.file, key, start)
        if not in_place:
            target.copy_(buffer)

    def _open(self, file: Path) -> dict[str, _Stored]:
        descriptor = self._descriptors[file] = _open_regular(file)
        try:
            size = os.fstat(descriptor).st_size
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            if not 0 < length <= min(size - 8, _MOST_JSON):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = _json(os.pread(descriptor, length, 8))
            stored = _check_header(file, header, 8 + length, size)
            # two readers of one format must agree on what it allows
            safe_open(file, framework="pt", backend="pread")
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from error
        return stored

    def _open_indexed(self, index: Path) -> dict[str, _Stored]:
        names = _weight_map(index)
        for key, name in names.items():
            if Path(name).name != name or "\\" in name or "\0" in name:
                raise CheckpointError(f"{index} places {key!r} in {name!r}: only a file name beside the index is read")
            if not name.endswith(".safetensors"):
                raise CheckpointError(f"{index} places {key!r} in {name!r}, which is not a .safetensors file")
            if not os.path.lexists(index.parent / name):
                raise CheckpointError(f"{index} places {key!r} in {name}, which is missing")
        held = {name: self._open(_inside(index.parent, name)) for name in sorted(set(names.values()))}
        for key, name in names.items():
            if key not in held[name]:
                raise CheckpointError(f"{index} places {key!r} in {name}, which does not hold it")
        stored: dict[str, _Stored] = {}
        # those that the index forgot too, as transformers has it: whether the model uses them is for the loader to say
        for name, tensors in held.items():
            if twice := next((key for key in tensors if key in stored), None):
                raise CheckpointError(f"{index.parent / name} holds tensor {twice!r}, and so does {stored[twice].file}")
            stored |= tensors
        return stored

    def _why_nothing_was_found(self) -> str:
        if not self.path.exists():
            return f"{self.path} does not exist"
        if not self.path.is_dir():
            return f"{self.path} is neither a folder nor a regular file"
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in self.path.glob(pattern))
        if pickles:
            return (
                f"{self.path} holds {pickles[0]}, a pickle, and no safetensors. Pickles can run code and are not read; "
                "convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        if ggufs := sorted(file.name for file in self.path.glob("*.gguf")):
            return f"{self.path} holds {ggufs[0]}: turn it into a Hugging Face folder with `automodel convert` first"
        return f"{self.path} holds neither {SINGLE} nor {INDEX}"


def _close(descriptors: dict[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def check_range(target: Tensor, key: str, start: int, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless ``target.numel()`` elements from ``start`` on lie in a tensor of that shape."""
    if not 0 <= start <= start + target.numel() <= math.prod(shape):
        raise ValueError(f"{key}: elements {start} to {start + target.numel()} of a tensor of shape {list(shape)}")


def refuse_non_finite(values: Tensor, file: Path, key: str, start: int) -> None:
    """Raise a CheckpointError if ``values``, the elements of ``key`` from ``start`` on, hold NaN or infinity."""
    if not values.numel() or not values.is_floating_point():
        return
    if values.dtype.itemsize == 1:  # most operations are not there for 8 bits
        values = values.float()
    low, high = values.aminmax()  # NaN comes through; a mask would take memory
    if not (low.isfinite() and high.isfinite()):
        first = int(values.reshape(-1).isfinite().logical_not().nonzero()[0])
        raise CheckpointError(f"{file}: tensor {key!r} holds {values.reshape(-1)[first]} at element {start + first}")


def _inside(folder: Path, name: str) -> Path:
    """The path of a file in the folder, unless it is a link that leads to where an untrusted folder must not point."""
    file, root = folder / name, folder.resolve()
    try:
        target = file.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    blobs = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]  # the Hub's cache
    if not any(target.is_relative_to(place) for place in (root, *blobs)):
        raise CheckpointError(f"{file} is a link to {target}, outside of its folder: copy the file into the folder")
    return file


def _open_regular(file: Path) -> int:
    """A descriptor of a regular file. Anything else could block, or never end."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise CheckpointError(f"{file} is not a regular file")
        return os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _weight_map(index: Path) -> dict[str, str]:
    """Key -> name of the file that holds it, as the index has it."""
    descriptor = _open_regular(index)
    try:
        with open(descriptor, "rb") as file:
            if (size := os.fstat(descriptor).st_size) > _MOST_JSON:
                raise ValueError(f"{size} bytes")
            weight_map = _json(file.read())["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("its weight_map is not a table of tensors")
        if wrong := next((key for key, name in weight_map.items() if not isinstance(name, str)), None):
            raise ValueError(f"{wrong!r} is placed in {reprlib.repr(weight_map[wrong])}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {type(error).__name__}: {error}") from error
    return weight_map


def _json(text: bytes) -> Any:
    return json.loads(text.decode(), object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return table


def _check_header(file: Path, header: Any, begin: int, end: int) -> dict[str, _Stored]:
    """The tensors of a header, which have to cover the bytes from ``begin`` to ``end`` of the file without a gap.

    Raises:
        ValueError: what is wrong, and with which tensor.
    """
    if not isinstance(header, dict):
        raise ValueError("its header is not a table of tensors")
    header.pop("__metadata__", None)
    stored, spans = {}, []
    for key, entry in header.items():
        shape, first, last = _check_entry(key, entry)
        stored[key] = _Stored(file, entry["dtype"], shape, begin + first)
        spans.append((first, last, key))
    at = 0
    for first, last, key in sorted(spans):
        if first != at:
            raise ValueError(f"tensor {key!r} begins at byte {first} of the data, where the one before ends at {at}")
        if last > end - begin:
            raise ValueError(f"tensor {key!r} ends at byte {last} of {end - begin}")
        at = last
    if at != end - begin:
        raise ValueError(f"its tensors end at byte {at} of {end - begin}")
    return stored


def _check_entry(key: str, entry: Any) -> tuple[tuple[int, ...], int, int]:
    """Shape, first byte and end of a tensor, from a header's entry for it."""
    fields = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or any(field not in entry for field in fields):
        raise ValueError(f"tensor {key!r} has no {', '.join(fields)}")
    dtype, shape, offsets = (entry[field] for field in fields)
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"tensor {key!r} has dtype {reprlib.repr(dtype)}, which is none of safetensors'")
    if not _are_natural(shape) or math.prod(max(size, 1) for size in shape) > _INT64_MAX // 8:
        raise ValueError(f"tensor {key!r} has shape {reprlib.repr(shape)}")
    if not _are_natural(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {key!r} has data_offsets {reprlib.repr(offsets)}")
    first, last = offsets
    if 8 * (last - first) != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"tensor {key!r} has {last - first} bytes for shape {reprlib.repr(shape)} of {dtype}")
    return tuple(shape), first, last


def _are_natural(numbers: Any) -> bool:
    # type(), because True is an int
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)
