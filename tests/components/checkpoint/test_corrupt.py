"""Damaged and hostile checkpoints: one clear error that names the file and the tensor, before any model is built."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM as HFLlamaForCausalLM

from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM
from nemo_automodel.components.checkpoint import CheckpointError, SafetensorsReader, load_parameters
from nemo_automodel.components.models.llama import LlamaForCausalLM
from tests.conftest import randomize, tiny

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NORM, OTHER = "model.norm.weight", "model.layers.0.input_layernorm.weight"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as transformers saves it: ``single`` and ``sharded``."""
    folder = tmp_path_factory.mktemp("saved")
    model = randomize(HFLlamaForCausalLM(tiny()))
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    return folder


# Each of these makes a function that damages a folder.


def header(change: Callable[[dict], object]) -> Damage:
    """Change the header as a table, or return what goes there instead; the data stay."""

    def damage(folder: Path) -> None:
        table, data = split(folder / SINGLE)
        changed = change(table)
        join(folder / SINGLE, json.dumps(changed if changed is not None else table).encode(), data)

    return damage


def text(change: Callable[[bytes], bytes], file: str = SINGLE) -> Damage:
    """Change the header's text."""

    def damage(folder: Path) -> None:
        table, data = split(folder / file)
        join(folder / file, change(json.dumps(table, separators=(",", ":")).encode()), data)

    return damage


def entry(**fields: object) -> Damage:
    """Replace fields of the entry of `NORM`."""
    return header(lambda table: table[NORM].update(fields))


def split(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join(file: Path, header: bytes, data: bytes) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


def length(value: int) -> Damage:
    """Let the file say that its header has so many bytes."""
    return data(lambda content: value.to_bytes(8, "little") + content[8:])


def data(change: Callable[[bytes], bytes], file: str = SINGLE) -> Damage:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def shift(key: str, first: int, last: int) -> Damage:
    """Move both ends of a tensor's bytes."""

    def change(table: dict) -> None:
        begin, end = table[key]["data_offsets"]
        table[key]["data_offsets"] = [begin + first, end + last]

    return header(change)


def swap_in(make: Callable[[Path], object], file: str = SINGLE) -> Damage:
    """Put something else where the file was."""

    def damage(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return damage


def link_out(file: str) -> Damage:
    """Move a file out of the folder and leave a link to it."""

    def damage(folder: Path) -> None:
        target = (folder / file).rename(folder.parent / "elsewhere.safetensors")
        (folder / file).symlink_to(target)

    return damage


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket has to be short
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


def index(change: Callable[[dict], object]) -> Damage:
    def damage(folder: Path) -> None:
        table = json.loads((folder / INDEX).read_text())
        changed = change(table)
        (folder / INDEX).write_text(json.dumps(changed if changed is not None else table))

    return damage


def place(name: object, key: str = NORM) -> Damage:
    return index(lambda table: table["weight_map"].update({key: name}))


def twice_in_index(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "{SHARD}",', 1))


def twice_in_shards(folder: Path) -> None:
    """The tensor lies in a second shard as well, of which the index does not speak."""
    save_file({**load_file(folder / SHARD), NORM: torch.ones(32)}, folder / SHARD, metadata={"format": "pt"})


def subfolder(folder: Path) -> None:
    (folder / "sub").mkdir()
    shutil.copy(folder / SHARD, folder / "sub" / "x.safetensors")
    place("sub/x.safetensors")(folder)


SHARD = "model-00001-of-00004.safetensors"
HUGE = 2**63
# name: (how it is damaged, names in the message); the file is the single one unless another is named first
HEADERS = {
    "length cut": (data(lambda content: content[:5]), []),
    "header cut": (data(lambda content: content[:100]), []),
    "data cut": (data(lambda content: content[:-1]), ["ends at byte"]),
    "data gone": (lambda f: join(f / SINGLE, json.dumps(split(f / SINGLE)[0]).encode(), b""), ["tensor '"]),
    "empty file": (data(lambda content: b""), []),
    "garbage": (data(lambda content: bytes(range(256)) * 8), []),
    "zeros": (data(lambda content: bytes(len(content))), []),
    "trailing byte": (data(lambda content: content + b"x"), ["its tensors end at byte"]),
    "header length 0": (length(0), ["a header of 0 bytes"]),
    "header length beyond the file": (length(10**7), ["a header of 10000000 bytes"]),
    "header length 2^64 - 1": (length(2**64 - 1), [f"a header of {2**64 - 1} bytes"]),
    "header length over 100 MB": (
        lambda f: (length(100_000_001)(f), os.truncate(f / SINGLE, 200_000_000)),
        ["a header of 100000001 bytes"],
    ),
    "header length one short": (
        lambda f: data(lambda c: (int.from_bytes(c[:8], "little") - 30).to_bytes(8, "little") + c[8:])(f),
        [],
    ),
    "not UTF-8": (text(lambda text: text.replace(b"model.norm", b"model.\xff\xfe")), ["utf-8"]),
    "UTF-16": (text(lambda text: text.decode().encode("utf-16")), []),
    "not JSON": (text(lambda text: text[:-1]), []),
    "deep JSON": (text(lambda text: b"[" * 200_000), []),
    "huge number": (text(lambda text: text.replace(b"[32]", b"[" + b"9" * 5000 + b"]")), []),
    "NaN as a number": (text(lambda text: text.replace(b"[32]", b"[NaN]")), ["tensor '"]),
    "lone surrogate": (text(lambda text: text.replace(b"model.norm", rb"model.\ud800")), []),
    "a list": (header(lambda table: [table]), ["not a table"]),
    "a string": (header(lambda table: "x"), ["not a table"]),
    "duplicate key": (
        text(lambda text: text[:-1] + f',"{NORM}":{json.dumps({"dtype": "F32"})}'.encode() + b"}"),
        [f"{NORM!r} is there twice"],
    ),
    "duplicate field": (text(lambda text: text.replace(b'"shape":[32]', b'"shape":[32],"shape":[32]')), ["'shape'"]),
    "entry a list": (header(lambda table: {**table, NORM: list(table[NORM].values())}), [NORM]),
    "entry null": (header(lambda table: {**table, NORM: None}), [NORM]),
    "no dtype": (header(lambda table: table[NORM].__delitem__("dtype")), [NORM]),
    "no shape": (header(lambda table: table[NORM].__delitem__("shape")), [NORM]),
    "no offsets": (header(lambda table: table[NORM].__delitem__("data_offsets")), [NORM]),
    "unknown dtype": (entry(dtype="F33"), [NORM, "'F33'"]),
    "dtype a number": (entry(dtype=32), [NORM]),
    "dtype a list": (entry(dtype=["F32"]), [NORM]),
    "wrong dtype": (entry(dtype="F64"), [NORM, "128 bytes for shape [32] of F64"]),
    "dtype of half a byte": (entry(dtype="F4", shape=[3]), [NORM]),
    "wrong shape": (entry(shape=[31]), [NORM, "128 bytes for shape [31]"]),
    "negative shape": (entry(shape=[-32]), [NORM, "[-32]"]),
    "negative twice": (entry(shape=[-4, -8]), [NORM]),
    "shape that overflows": (entry(shape=[2**32, 2**32]), [NORM]),
    "shape that overflows to the right one": (entry(shape=[2**62 + 8, 4]), [NORM]),
    "huge and empty": (entry(shape=[0, HUGE], data_offsets=[0, 0]), [NORM]),
    "shape without end": (entry(shape=[2] * 100_000), [NORM]),
    "shape of floats": (entry(shape=[32.0]), [NORM]),
    "shape of strings": (entry(shape=["32"]), [NORM]),
    "shape of booleans": (entry(shape=[True]), [NORM]),
    "shape a number": (entry(shape=32), [NORM]),
    "shape null": (entry(shape=None), [NORM]),
    "offsets reversed": (entry(data_offsets=[128, 0]), [NORM]),
    "offsets negative": (entry(data_offsets=[-128, 0]), [NORM]),
    "offsets of floats": (entry(data_offsets=[0.0, 128.0]), [NORM]),
    "one offset": (entry(data_offsets=[128]), [NORM]),
    "three offsets": (entry(data_offsets=[0, 128, 128]), [NORM]),
    "offsets beyond the file": (shift(NORM, 10**9, 10**9), [NORM]),
    "offsets huge": (entry(data_offsets=[HUGE, HUGE + 128]), [NORM]),
    "overlap": (shift(OTHER, -4, -4), ["begins at byte", "tensor '"]),
    "gap": (shift(NORM, 4, 4), [NORM]),
    "too many bytes for the shape": (shift(NORM, 0, 4), [NORM]),
    "metadata of numbers": (header(lambda table: table.update(__metadata__={"format": 1})), []),
    "a tensor's place taken by another": (
        header(lambda table: table[NORM].update(data_offsets=table[OTHER]["data_offsets"])),
        ["begins at byte", "tensor '"],
    ),
}
FILES = {
    "a folder": (swap_in(Path.mkdir), ["not a regular file"]),
    "a pipe": (swap_in(os.mkfifo), ["not a regular file"]),
    "a socket": (swap_in(make_socket), ["not a regular file"]),
    "a device": (swap_in(lambda path: path.symlink_to("/dev/zero")), ["link to /dev/zero"]),
    "a link to nothing": (swap_in(lambda path: path.symlink_to("nothing")), ["cannot be read"]),
    "a link to itself": (swap_in(lambda path: path.symlink_to(path)), []),
    "a link out of the folder": (link_out(SINGLE), ["outside of its folder"]),
    "a relative link out": (
        lambda f: ((f / SINGLE).rename(f.parent / "x"), (f / SINGLE).symlink_to("../x")),
        ["outside of its folder"],
    ),
}
INDICES = {
    "shard cut": (data(lambda content: content[:-1], SHARD), [SHARD, "tensor '"]),
    "shard a pipe": (swap_in(os.mkfifo, SHARD), [SHARD, "not a regular file"]),
    "shard missing": (lambda f: (f / SHARD).unlink(), [SHARD, "is missing", "places 'model."]),
    "shard links out": (link_out(SHARD), [SHARD, "outside of its folder"]),
    "index links out": (link_out(INDEX), ["outside of its folder"]),
    "index a pipe": (swap_in(os.mkfifo, INDEX), ["not a regular file"]),
    "index a folder": (swap_in(Path.mkdir, INDEX), ["not a regular file"]),
    "index empty": (lambda f: (f / INDEX).write_text(""), []),
    "index not JSON": (lambda f: (f / INDEX).write_text("[1"), []),
    "index binary": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe"), []),
    "index deep": (lambda f: (f / INDEX).write_text("[" * 10**5), []),
    "index deep in its map": (lambda f: (f / INDEX).write_text('{"weight_map":' * 10**5), []),
    "index over 100 MB": (lambda f: os.truncate(f / INDEX, 100_000_001), ["100000001 bytes"]),
    "index a list": (index(lambda table: []), []),
    "index without a map": (index(lambda table: {}), ["weight_map"]),
    "map a list": (index(lambda table: {"weight_map": [NORM]}), ["weight_map"]),
    "map null": (index(lambda table: {"weight_map": None}), ["weight_map"]),
    "map empty": (index(lambda table: {"weight_map": {}}), ["weight_map"]),
    "places a number": (place(1), [NORM]),
    "places null": (place(None), [NORM]),
    "places a list": (place([SHARD]), [NORM]),
    "names a missing file": (place("y.safetensors"), [NORM, "y.safetensors, which is missing"]),
    "names too long a file": (place("y" * 300 + ".safetensors"), [NORM, "which is missing"]),
    "climbs out": (place("../y.safetensors"), [NORM, "'../y.safetensors'"]),
    "climbs out and back": (place(f"../broken/{SHARD}"), [NORM]),
    "absolute": (place("/etc/passwd"), [NORM, "'/etc/passwd'"]),
    "absolute and inside": (lambda f: place(str(f / SHARD))(f), [NORM]),
    "backslashes": (place("..\\y.safetensors"), [NORM]),
    "subfolder": (subfolder, [NORM, "'sub/x.safetensors'"]),
    "dot": (place(f"./{SHARD}"), [NORM]),
    "parent": (place(".."), [NORM]),
    "empty name": (place(""), [NORM]),
    "NUL": (place(f"{SHARD}\0"), [NORM]),
    "NUL within": (place("a\0.safetensors"), [NORM]),
    "lone surrogate": (place("\ud800.safetensors"), [NORM]),
    "not safetensors": (place("config.json"), [NORM, "'config.json'"]),
    "pickle": (place("pytorch_model.bin"), [NORM, "'pytorch_model.bin'"]),
    "file without the tensor": (place(SHARD), [NORM, SHARD, "does not hold it"]),
    "tensor nobody holds": (place(SHARD, "x"), ["'x'", SHARD, "does not hold it"]),
    "twice in the index": (twice_in_index, [NORM]),
    "twice in the shards": (twice_in_shards, [NORM, SHARD, "and so does"]),
}
TABLE = {
    f"{layout}: {name}": (layout, damage, [file, *said])
    for layout, file, table in (
        ("single", SINGLE, HEADERS),
        ("single", SINGLE, FILES),
        ("sharded", "model", INDICES),
    )
    for name, (damage, said) in table.items()
}


@pytest.mark.parametrize("name", TABLE)
def test_damage_is_named_and_nothing_is_built(saved, tmp_path, monkeypatch, name):
    layout, damage, said = TABLE[name]
    folder = tmp_path / "broken"
    shutil.copytree(saved / layout, folder)
    assert len(SafetensorsReader(folder)) == len(load_file(saved / "single" / SINGLE))
    damage(folder)
    monkeypatch.setattr(LlamaForCausalLM, "__init__", lambda *args, **kwargs: pytest.fail("a model was built"))
    for load in (SafetensorsReader, LlamaForCausalLM.from_pretrained, NeMoAutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        message = str(caught.value)
        assert message.startswith(f"{folder}/")
        assert len(message) < 1000
        for part in said:
            assert part in message


def test_the_table_has_at_least_forty_kinds():
    assert len(TABLE) >= 40


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", [NORM, "model.layers.1.self_attn.v_proj.weight", "lm_head.weight"])
def test_values_that_are_not_finite_when_checking_is_asked_for(saved, tmp_path, key, value):
    tensors = load_file(saved / "single" / SINGLE)
    tensors[key].view(-1)[17] = value
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny())
    load = {"layout": model.state_dict_adapter.layout, "dtype": torch.bfloat16}
    message = rf"{SINGLE}: tensor '{key}' holds {value} at element 17"
    with pytest.raises(CheckpointError, match=message):
        load_parameters(model, SafetensorsReader(tmp_path, check_finite=True), **load)
    assert all(parameter.is_meta for parameter in model.parameters())
    load_parameters(model, SafetensorsReader(tmp_path), **load)
