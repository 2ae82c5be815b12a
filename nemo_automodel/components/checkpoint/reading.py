"""A safetensors checkpoint as a table of tensors that are read one at a time."""

import json
from collections.abc import Iterator
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


class SafetensorsReader:
    """Names, shapes, dtypes and values of the tensors in a checkpoint folder or a single ``.safetensors`` file.

    Files are read (not mapped), so the process holds what it asked for and nothing else. Reading from several threads
    is safe.

    Args:
        path: a folder with ``model.safetensors`` or ``model.safetensors.index.json``, or one file.

    Raises:
        CheckpointError: no safetensors there, a file that is missing, truncated or not safetensors, an index that
            disagrees with its files.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files: dict[str, Path] = {}
        if self.path.is_file():
            self._add_file(self.path)
        elif (self.path / INDEX).is_file():
            self._add_index(self.path / INDEX)
        elif (self.path / SINGLE).is_file():
            self._add_file(self.path / SINGLE)
        else:
            raise CheckpointError(self._why_nothing_was_found())
        self._handles = {file: self._open(file) for file in set(self._files.values())}
        held = {file: set(handle.keys()) for file, handle in self._handles.items()}
        for key, file in self._files.items():
            if key not in held[file]:
                raise CheckpointError(f"{self.path / INDEX} places {key!r} in {file.name}, which does not hold it")

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the tensor ``key``."""
        return tuple(self._slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of the tensor ``key``.

        Raises:
            CheckpointError: a dtype this library does not read.
        """
        name = self._slice(key).get_dtype()
        if name not in _DTYPES:
            raise CheckpointError(f"{self._files[key]}: tensor {key!r} has dtype {name}, which is not read here")
        return _DTYPES[name]

    def read(self, key: str) -> Tensor:
        """The tensor ``key`` on the CPU, in memory of its own.

        Raises:
            CheckpointError: the file cannot be read any more.
        """
        file = self._files[key]
        try:
            return self._handles[file].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: tensor {key!r} cannot be read: {error}") from error

    def _slice(self, key: str):  # type: ignore[no-untyped-def]  # safetensors has no public type for it
        return self._handles[self._files[key]].get_slice(key)

    def _add_file(self, file: Path) -> None:
        self._files.update(dict.fromkeys(self._open(file).keys(), file))

    def _add_index(self, index: Path) -> None:
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            names = {str(key): str(name) for key, name in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index: {type(error).__name__}: {error}") from error
        for key, name in names.items():
            if Path(name).name != name:
                raise CheckpointError(f"{index} places {key!r} in {name!r}: only a file name beside the index is read")
            if not (index.parent / name).is_file():
                raise CheckpointError(f"{index} places {key!r} in {name}, which is missing")
            self._files[key] = index.parent / name

    @staticmethod
    def _open(file: Path) -> safe_open:
        try:
            return safe_open(file, framework="pt", backend="pread")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from error

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
