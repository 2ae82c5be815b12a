"""A safetensors checkpoint as a table of tensors that are read one at a time."""

import json
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as it is; the message names the file, the tensor and what is wrong."""


@dataclass(frozen=True)
class _Stored:
    """Where the bytes of a tensor lie."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsReader:
    """Names, shapes, dtypes and values of the tensors in a checkpoint folder or a single ``.safetensors`` file.

    Files are read (not mapped), so the process holds what it asked for and nothing else. They stay open, so that a
    file replaced meanwhile is still read as it was. Reading from several threads is safe.

    Args:
        path: a folder with ``model.safetensors`` or ``model.safetensors.index.json``, or one file.

    Raises:
        CheckpointError: no safetensors there, a file that is missing, truncated or not safetensors, an index that
            disagrees with its files.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._descriptors: dict[Path, int] = {}
        self._local = threading.local()
        weakref.finalize(self, _close, self._descriptors)
        if self.path.is_file():
            self._stored = self._open(self.path)
        elif (self.path / SINGLE).is_file():  # before the index, as transformers has it
            self._stored = self._open(self.path / SINGLE)
        elif (self.path / INDEX).is_file():
            self._stored = self._open_indexed(self.path / INDEX)
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

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of the tensor ``key``.

        Raises:
            CheckpointError: a dtype this library does not read.
        """
        stored = self._stored[key]
        if stored.dtype not in _DTYPES:
            raise CheckpointError(f"{stored.file}: tensor {key!r} has dtype {stored.dtype}, which is not read here")
        return _DTYPES[stored.dtype]

    def read(self, key: str) -> Tensor:
        """The tensor ``key`` on the CPU, in memory of its own.

        Raises:
            CheckpointError: the file cannot be read any more.
        """
        value = torch.empty(self.shape(key), dtype=self.dtype(key))
        self.read_into(value, key)
        return value

    def read_into(self, target: Tensor, key: str, start: int = 0) -> None:
        """Fill ``target`` with ``target.numel()`` elements of the tensor ``key``, in row-major order from ``start`` on.

        A contiguous target on the CPU is read in place; one of other strides, of another dtype or on another device
        costs the host a copy of its size.

        Raises:
            CheckpointError: the file cannot be read any more.
        """
        stored, dtype = self._stored[key], self.dtype(key)
        in_place = target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()
        buffer = target.detach() if in_place else self._buffer(target.numel(), dtype).view(target.shape)
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
        if not in_place:
            target.copy_(buffer)

    def _buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """Memory of this thread, kept: the allocator would ask the system for it again at every read."""
        held = getattr(self._local, "buffer", None)
        if held is None or held.nbytes < size * dtype.itemsize:
            held = self._local.buffer = torch.empty(size * dtype.itemsize, dtype=torch.uint8)
        return held[: size * dtype.itemsize].view(dtype)

    def _open(self, file: Path) -> dict[str, _Stored]:
        try:
            # safetensors checks the header: sizes, offsets, overlaps, the file's length
            safe_open(file, framework="pt", backend="pread")
            self._descriptors[file] = os.open(file, os.O_RDONLY)
            length = int.from_bytes(os.pread(self._descriptors[file], 8, 0), "little")
            header = json.loads(os.pread(self._descriptors[file], length, 8))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from error
        header.pop("__metadata__", None)
        return {
            key: _Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for key, entry in header.items()
        }

    def _open_indexed(self, index: Path) -> dict[str, _Stored]:
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            names = {str(key): str(name) for key, name in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index} is not a safetensors index: {type(error).__name__}: {error}") from error
        for key, name in names.items():
            if Path(name).name != name:
                raise CheckpointError(f"{index} places {key!r} in {name!r}: only a file name beside the index is read")
            if not (index.parent / name).is_file():
                raise CheckpointError(f"{index} places {key!r} in {name}, which is missing")
        held = {name: self._open(index.parent / name) for name in sorted(set(names.values()))}
        for key, name in names.items():
            if key not in held[name]:
                raise CheckpointError(f"{index} places {key!r} in {name}, which does not hold it")
        return {key: held[name][key] for key, name in names.items()}

    def _why_nothing_was_found(self) -> str:
        if not self.path.exists():
            return f"{self.path} does not exist"
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
