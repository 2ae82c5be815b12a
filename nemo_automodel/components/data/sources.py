"""Rows from files, folders and the Hugging Face Hub."""

import json
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


class Rows(Protocol):
    """A `datasets.Dataset`, or what else has rows in a fixed order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Row]: ...

    def __getitem__(self, index: int, /) -> Row: ...


def load_rows(source: str | Path, split: str | None = None) -> Rows:
    """Open a source of rows; files are neither shuffled nor otherwise changed.

    Args:
        source: a `.jsonl`, `.json` (one list, or JSON Lines), `.parquet` or `.csv` file; a folder of such files or one
            written by `Dataset.save_to_disk`; or the `name` or `name:config` of a data set on the Hub.
        split: the split, which may be a slice like `train[:95%]`. A file has a single split, `train`. None is enough
            where there is only one split.

    Raises:
        FileNotFoundError: there is no such file, folder or data set. What looks like a path is not searched on the Hub.
        ValueError: a file is of another type or malformed (the message has the line), or there is no such split.
    """
    path, suffix = Path(source).expanduser(), Path(source).suffix.lower()
    if path.is_file() and suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a file of type {', '.join(SUFFIXES)}, got {suffix or 'no suffix'}")
    if path.is_file() and suffix in (".json", ".jsonl"):
        return _take_split({"train": _read_json(path)}, split, path)
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        import datasets  # it costs seconds

        saved = datasets.load_from_disk(str(path))
        return _take_split(saved if isinstance(saved, Mapping) else {"train": saved}, split, path)
    if path.is_file():
        return _load_dataset(suffix[1:], split or "train", data_files=str(path))
    if path.is_dir():
        return _load_dataset(str(path), split)
    if suffix in SUFFIXES or isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"there is no file or folder {source} (from {Path.cwd()})")
    name, _, config = source.partition(":")
    return _load_dataset(name, split, name=config or None)


class JsonLines:
    """The rows of a JSON Lines file, checked at once but parsed when read, so that only offsets are in memory."""

    def __init__(self, path: Path, offsets: "array[int]"):
        self._path, self._offsets = path, offsets

    @classmethod
    def scan(cls, path: Path) -> "JsonLines":
        """Find the lines of `path`, the empty ones left out.

        Raises:
            ValueError: a line is not a JSON object; the message has its number.
        """
        offsets, position = array("q"), 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    _check_row(_parse(line, f"{path}, line {number}"), f"{path}, line {number}")
                    offsets.append(position)
                position += len(line)
        return cls(path, offsets)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int, /) -> Row:
        [row] = JsonLines(self._path, array("q", [self._offsets[index]]))
        return row

    def __iter__(self) -> Iterator[Row]:
        with self._path.open("rb") as file:
            for offset in self._offsets:
                file.seek(offset)
                yield json.loads(file.readline())

    def select(self, indices: range) -> "JsonLines":
        """The rows at `indices`, a range of step 1."""
        return JsonLines(self._path, self._offsets[indices.start : indices.stop])


def _read_json(path: Path) -> Rows:
    """A `.jsonl` or `.json` file; the latter may also be one list of rows."""
    with path.open("rb") as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")  # a byte order mark, white space
    if path.suffix.lower() == ".jsonl" or not start.startswith(b"["):
        return JsonLines.scan(path)
    rows: list[Row] = _parse(path.read_bytes(), str(path))
    for index, row in enumerate(rows):
        _check_row(row, f"{path}, item {index}")
    return rows


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ValueError(f"{where}: not valid JSON: {error}") from error


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {json.dumps(row)[:100]}")


def _load_dataset(path: str, split: str | None, **options: Any) -> Rows:
    """One split of what `datasets.load_dataset(path)` loads: a data set by name, a folder, or files by their type."""
    import datasets  # it costs seconds

    try:
        loaded = datasets.load_dataset(path, split=split, **options)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"there is no file or folder {path}, nor a data set that can be reached: {error}"
        ) from error
    return loaded if split else _take_split(loaded, None, path)


def _take_split(parts: Mapping[str, Any], split: str | None, source: str | Path) -> Rows:
    """One of the named `parts`, or a slice of it."""
    if split is None:
        if len(parts) > 1:
            raise ValueError(f"{source} has the splits {', '.join(parts)}: name one")
        split = next(iter(parts))
    if split in parts:
        rows: Rows = parts[split]
        return rows
    import datasets  # it costs seconds

    try:
        lengths = {name: len(part) for name, part in parts.items()}
        [piece] = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{source}: cannot read the split {split!r} of {', '.join(parts)}: {error}") from error
    part = parts[piece.splitname]
    return part[piece.from_ : piece.to] if isinstance(part, list) else part.select(range(piece.from_, piece.to))
