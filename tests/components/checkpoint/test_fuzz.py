"""Mutated headers and indices: read as the safetensors library reads them, or refused by `CheckpointError`."""

import json
import math
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from nemo_automodel.components.checkpoint import CheckpointError, SafetensorsReader

INDEX = "model.safetensors.index.json"
TENSORS = {
    "a.weight": torch.arange(6).view(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
    "empty": torch.empty(0, 4),
}
# what a parser trips over, to be put anywhere
SNIPPETS = [
    *(b"-1 -0 0 1 2 4 8 16 24 32 1e3 2.0 -0.0 9223372036854775807 18446744073709551616 true null NaN Infinity".split()),
    *(b'[] {} [ ] { } , : " \\ \\u0000 \\ud800 \\"'.split()),
    *(b'"F32" "F64" "BF16" "I64" "F4" "U16" "C64" "BOOL" "b" "c"'.split()),
    *(b'"dtype" "shape" "data_offsets" "__metadata__"'.split()),
    *(b"../ / a.safetensors b.safetensors .. [2,3] [0,4] [1,1,6]".split()),
    *(b" ", b"\n", b"\0", b"\xff", b"\xc3\xa9", b"[" * 5000, b"9" * 5000),
]


TOKEN = re.compile(rb'"[^"]*"|\d+|[\[\]{},:]')
Edit = tuple[float, int | float, bytes]
shares = st.floats(0, 1, exclude_max=True)
# where (a share of the text), how many bytes go there, what comes instead
byte_edits = st.tuples(shares, st.integers(0, 4), st.sampled_from(SNIPPETS) | st.binary(max_size=3))
# which token goes (a share of all), which one comes: another of the text (a share of those of its kind), or a snippet
token_edits = st.tuples(shares, shares, st.just(b"") | st.just(b"") | st.sampled_from(SNIPPETS))
edits = st.lists(byte_edits | token_edits | token_edits, min_size=1, max_size=3)


def mutate(text: bytes, changes: list[Edit]) -> bytes:
    for share, count, instead in changes:
        if isinstance(count, int):
            at = int(share * len(text))
            text = text[:at] + instead + text[at + count :]
        elif tokens := list(TOKEN.finditer(text)):
            token = tokens[int(share * len(tokens))]
            alike = [other[0] for other in tokens if other[0][:1].isdigit() == token[0][:1].isdigit()]
            text = text[: token.start()] + (instead or alike[int(count * len(alike))]) + text[token.end() :]
    return text


def agree(path: Path, files: list[Path]) -> bool:
    """Whether the checkpoint was read; then every tensor is what the safetensors library reads."""
    try:
        reader = SafetensorsReader(path)
    except CheckpointError:
        return False
    theirs = [safe_open(file, framework="pt", backend="pread") for file in files]
    holders = {key: file for file in theirs for key in file.keys()}  # noqa: SIM118 (not a dict)
    assert set(reader) == set(holders)
    for key in reader:
        dtype = None
        with suppress(CheckpointError):  # a dtype of the format that torch or this library lacks
            dtype = reader.dtype(key)
        if dtype is not None:
            assert math.prod(reader.shape(key)) * dtype.itemsize <= reader.file(key).stat().st_size
            ours, expected = reader.read(key), holders[key].get_tensor(key)
            assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
            assert torch.equal(ours.view(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
    return True


def check_header(folder: Path, changes: list[Edit], fix_length: bool, cut: int) -> bool:
    """Change the header; ``fix_length`` lets the file say its new length, so that the parser sees it."""
    file = folder / "fuzzed.safetensors"
    save_file(TENSORS, file)
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    if fix_length:
        header = mutate(content[8:end], changes)
        content = len(header).to_bytes(8, "little") + header + content[end:]
    else:
        content = mutate(content[:end], changes) + content[end:]
    file.write_bytes(content[: len(content) - cut])
    return agree(file, [file])


def check_index(folder: Path, changes: list[Edit]) -> bool:
    for name, keys in {"a.safetensors": ["a.weight", "b"], "b.safetensors": ["c", "empty"]}.items():
        save_file({key: TENSORS[key] for key in keys}, folder / name)
    weight_map = {"a.weight": "a.safetensors", "b": "a.safetensors", "c": "b.safetensors", "empty": "b.safetensors"}
    text = json.dumps({"metadata": {"total_size": 96}, "weight_map": weight_map}).encode()
    (folder / INDEX).write_bytes(mutate(text, changes))
    try:
        named = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        named = set()
    return agree(folder, [folder / name for name in ("a.safetensors", "b.safetensors") if name in named])


def fuzz(folder: Path, examples: int) -> None:
    read = {"header": 0, "index": 0}
    options = {"deadline": 60_000, "suppress_health_check": list(HealthCheck), "max_examples": examples}

    @settings(**options)
    @given(changes=edits, fix_length=st.sampled_from([True, True, True, False]), cut=st.sampled_from([0, 0, 0, 1, 50]))
    def headers(changes: list[Edit], fix_length: bool, cut: int) -> None:
        read["header"] += check_header(folder, changes, fix_length, cut)

    @settings(**options)
    @given(changes=edits)
    def indices(changes: list[Edit]) -> None:
        read["index"] += check_index(folder, changes)

    headers()
    indices()
    # otherwise all would be refused, and the comparison idle
    assert min(read.values()) >= examples / 100, read


def test_fuzzed_headers_and_indices(tmp_path):
    fuzz(tmp_path, 400)


@pytest.mark.slow
def test_fuzzed_headers_and_indices_for_longer(tmp_path):
    fuzz(tmp_path, 10_000)
