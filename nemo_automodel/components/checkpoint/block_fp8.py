"""Checkpoints in block FP8 (DeepSeek's, Qwen's ``-FP8``): dequantized range by range, while they are read."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_automodel.components.checkpoint.reading import (
    CheckpointError,
    SafetensorsReader,
    Scratch,
    TensorReader,
    check_range,
    refuse_non_finite,
)
from nemo_automodel.components.problems import listed

_SCALE = "_scale_inv"
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)

PIECE = 2**18
"""Elements that are dequantized at a time: a megabyte of float32."""


def open_checkpoint(
    path: str | Path,
    quantization_config: Mapping[str, Any] | None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    check_finite: bool = False,
) -> TensorReader:
    """The reader for a checkpoint with that ``quantization_config`` in its config.json.

    Args:
        path: as for `SafetensorsReader`.
        quantization_config: None or empty for a checkpoint that is not quantized; else ``quant_method`` ``"fp8"`` and
            ``weight_block_size``, two positive numbers. ``modules_to_not_convert`` (or ``ignored_layers``) names
            modules whose tensors are stored as they are.
        dtype: what FP8 weights are read as; the model's own, so that they are rounded once.
        check_finite: refuse NaN and infinity, as stored and as dequantized.

    Raises:
        CheckpointError: another quantization, or a checkpoint that one of the readers refuses.
    """
    if not quantization_config:
        return SafetensorsReader(path, check_finite=check_finite)
    where = f"{Path(path) / 'config.json'}: quantization_config"
    if (method := quantization_config.get("quant_method")) != "fp8":
        raise CheckpointError(f"{where} has quant_method {method!r}; only 'fp8' in blocks is read")
    size = quantization_config.get("weight_block_size")
    if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise CheckpointError(f"{where} has weight_block_size {size!r}; two positive numbers are needed")
    kept = quantization_config.get("modules_to_not_convert") or quantization_config.get("ignored_layers") or []
    if not (isinstance(kept, (list, tuple)) and all(isinstance(name, str) for name in kept)):
        raise CheckpointError(f"{where} has modules_to_not_convert {kept!r}; a list of module names is needed")
    reader = SafetensorsReader(path, check_finite=check_finite)
    return BlockFP8Reader(reader, (size[0], size[1]), dtype=dtype, modules_to_not_convert=kept)


class BlockFP8Reader(TensorReader):
    """What a `SafetensorsReader` reads, with FP8 matrices multiplied by the scales of their blocks.

    A matrix ``[rows, columns]`` called ``K`` has one scale for each block of ``block_size``, in ``K_scale_inv``
    ``[ceil(rows / block rows), ceil(columns / block columns)]``, which is not among the keys here. Value times scale
    is computed in float32 and rounded once, to ``dtype``. The memory this takes is that of `PIECE` elements, plus the
    scales met so far: at 128 x 128 blocks, a 4096th of the bytes of their matrices.

    Args:
        reader: the checkpoint as stored. Its ``check_finite`` holds for the products too.
        block_size: rows and columns of a block.
        dtype: of the dequantized tensors.
        modules_to_not_convert: names of modules (or the last parts of their names) that must not be in FP8.

    Raises:
        CheckpointError: an FP8 tensor that has no scale, is no matrix or is said not to be converted; a scale of the
            wrong shape or dtype, or one without an FP8 tensor. All are named at once.
    """

    def __init__(
        self,
        reader: SafetensorsReader,
        block_size: tuple[int, int] = (128, 128),
        *,
        dtype: torch.dtype = torch.bfloat16,
        modules_to_not_convert: Sequence[str] = (),
    ):
        self.path = reader.path
        self._reader, self._block, self._dtype = reader, block_size, dtype
        self._scales: dict[str, Tensor] = {}
        self._stored, self._values = Scratch(), Scratch()
        self._keys = {key: None for key in reader if not key.endswith(_SCALE)}
        self._quantized = {key for key in self._keys if self._is_fp8(key)}
        problems = [
            *(problem for key in self._keys if (problem := self._problem(key, modules_to_not_convert))),
            *(
                f"{reader.file(key)}: tensor {key!r} is a scale for {key.removesuffix(_SCALE)!r}, which is "
                + ("missing" if key.removesuffix(_SCALE) not in reader else "not in FP8")
                for key in reader
                if key.endswith(_SCALE) and key.removesuffix(_SCALE) not in self._quantized
            ),
        ]
        if problems:
            raise CheckpointError(listed(problems))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the tensor ``key``."""
        return self._reader.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of the tensor ``key`` as it is read: for FP8 weights, the one they are dequantized to.

        Raises:
            CheckpointError: a dtype this library does not read.
        """
        return self._dtype if key in self._quantized else self._reader.dtype(key)

    def read_into(self, target: Tensor, key: str, start: int = 0) -> None:
        """Fill ``target`` with ``target.numel()`` elements of the tensor ``key``, in row-major order from ``start`` on.

        A target of another dtype gets the values as rounded to `dtype`, whatever its own precision, so that a model
        does not depend on how its tensors are cut into pieces. Targets that are not contiguous on the CPU and of that
        dtype cost the host a copy of their size.

        Raises:
            CheckpointError: the file cannot be read any more, or NaN or infinity where that is checked.
            ValueError: a range that does not lie in the tensor.
        """
        if key not in self._quantized:
            self._reader.read_into(target, key, start)
            return
        check_range(target, key, start, self.shape(key))
        in_place = target.device.type == "cpu" and target.dtype == self._dtype and target.is_contiguous()
        buffer = target.detach() if in_place else torch.empty(target.shape, dtype=self._dtype)
        for at, piece in enumerate(buffer.view(-1).split(PIECE)):
            self._dequantize_into(piece, key, start + at * PIECE)
        if not in_place:
            target.copy_(buffer)

    def _dequantize_into(self, piece: Tensor, key: str, start: int) -> None:
        """Fill ``piece`` ``[size]``, at most `PIECE` elements of our dtype, from ``start`` on."""
        stored = self._stored.take(piece.numel(), self._reader.dtype(key))
        values = self._values.take(piece.numel(), torch.float32)
        self._reader.read_into(stored, key, start)
        values.copy_(stored)
        scale, columns = self._scale(key), self.shape(key)[1]
        begin, end = start, start + piece.numel()
        while begin < end:
            row, column = divmod(begin, columns)
            block_row = row // self._block[0]
            if column or end - begin < columns:  # a part of a row
                width, rows = min(end - begin, columns - column), 1
            else:  # as many whole rows as the piece has of this row of blocks
                width, rows = columns, min(end // columns, (block_row + 1) * self._block[0]) - row
            part = values[begin - start : begin - start + rows * width].view(rows, width)
            part *= self._row_of_scales(scale[block_row], column, width)
            begin += rows * width
        piece.copy_(values)
        if self._reader.check_finite:
            refuse_non_finite(piece, self._reader.file(key), key, start)

    def _row_of_scales(self, scales: Tensor, column: int, width: int) -> Tensor:
        """Scale ``[width]`` of each column from ``column`` on, of the scales ``[blocks]`` in a row of blocks."""
        size = self._block[1]
        first, last = column // size, math.ceil((column + width) / size)
        return scales[first:last].repeat_interleave(size)[column - first * size :][:width]

    def _scale(self, key: str) -> Tensor:
        """Scales of the blocks of a matrix, in float32, kept for its next piece."""
        if key not in self._scales:  # two threads may both read it: to the same effect
            self._scales[key] = self._reader.read(key + _SCALE).float()
        return self._scales[key]

    def _is_fp8(self, key: str) -> bool:
        try:
            return self._reader.dtype(key) in _FP8
        except CheckpointError:  # a dtype that is not read: an error as soon as it is asked for
            return False

    def _problem(self, key: str, kept: Sequence[str]) -> str | None:
        """What is wrong with an FP8 tensor and its scale."""
        if key not in self._quantized:
            return None
        what, shape, scale = f"{self._reader.file(key)}: tensor {key!r}", self.shape(key), key + _SCALE
        if name := next((name for name in kept if f".{name}." in f".{key}."), None):
            return f"{what} is in FP8, though modules_to_not_convert lists {name!r}"
        if len(shape) != 2:
            return f"{what} is in FP8 with shape {list(shape)}; only matrices have blocks"
        if scale not in self._reader:
            return f"{what} is in FP8, and its {scale!r} is missing"
        what = f"{self._reader.file(scale)}: tensor {scale!r}"
        blocks = [math.ceil(size / block) for size, block in zip(shape, self._block, strict=True)]
        if list(self._reader.shape(scale)) != blocks:
            return f"{what} has shape {list(self._reader.shape(scale))} where {list(shape)} has {blocks} blocks"
        if self._reader.dtype(scale) not in _SCALE_DTYPES:
            return f"{what} has dtype {self._reader.dtype(scale)}; a floating-point one is needed"
        return None
