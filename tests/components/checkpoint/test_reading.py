"""`SafetensorsReader`: what it reads equals what safetensors reads; what is damaged is one clear error."""

import contextlib
import gc
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM as HFLlamaForCausalLM

from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM
from nemo_automodel.components.checkpoint import CheckpointError, SafetensorsReader
from nemo_automodel.components.checkpoint.reading import _DTYPES
from nemo_automodel.components.models.llama import LlamaForCausalLM
from tests.conftest import tiny

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model as transformers saves it: ``single`` and ``sharded``."""
    folder = tmp_path_factory.mktemp("saved")
    model = HFLlamaForCausalLM(tiny())
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    return folder


def test_every_dtype_and_shape_bitwise(tmp_path):
    tensors = {
        f"{name}-{len(shape)}": torch.randint(0, 2, shape, dtype=torch.uint8).to(dtype)
        for name, dtype in _DTYPES.items()
        for shape in ((), (3,), (2, 3, 5), (0, 4))
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        reader = SafetensorsReader(path)
        assert set(reader) == set(tensors)
        assert len(reader) == len(tensors)
        assert "F32-1" in reader
        assert "__metadata__" not in reader
        for key, expected in tensors.items():
            value = reader.read(key)
            assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
            assert (reader.shape(key), reader.dtype(key)) == (tuple(expected.shape), expected.dtype)
            assert value.view(-1).view(torch.uint8).tolist() == expected.view(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_are_read_into_any_strides_and_dtype(tmp_path, dtype):
    values = torch.randn(6, 4)
    save_file({"before": torch.ones(3), "x": values}, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    for target in (
        torch.zeros(2, 4, dtype=dtype),
        torch.zeros(4, 2, dtype=dtype).T,
        torch.zeros(8, 4, dtype=dtype)[::4],
    ):
        reader.read_into(target, "x", start=3 * 4)
        assert torch.equal(target, values[3:5].to(dtype))


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_folders_of_transformers(saved, layout):
    reader = SafetensorsReader(saved / layout)
    expected = load_file(saved / "single" / "model.safetensors")
    assert set(reader) == set(expected)
    assert all(torch.equal(reader.read(key), value) for key, value in expected.items())


def test_the_single_file_comes_before_the_index_as_in_transformers(saved, tmp_path):
    shutil.copytree(saved / "sharded", tmp_path, dirs_exist_ok=True)
    value = torch.full((1,), 7.0)
    save_file({"x": value}, tmp_path / "model.safetensors")
    assert list(SafetensorsReader(tmp_path)) == ["x"]


def test_a_replaced_file_is_read_as_it_was_and_files_are_closed(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(4)}, file)
    before = os.listdir("/proc/self/fd")
    reader = SafetensorsReader(tmp_path)
    save_file({"x": torch.ones(4)}, tmp_path / "new")
    os.replace(tmp_path / "new", file)
    assert reader.read("x").tolist() == [0] * 4
    del reader
    gc.collect()
    assert os.listdir("/proc/self/fd") == before


def test_a_file_cut_while_it_is_open(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(40)}, file)
    reader = SafetensorsReader(tmp_path)
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'x' ends too early"):
        reader.read("x")


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def edit_index(folder: Path, key: str, name: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][key] = name
    (folder / INDEX).write_text(json.dumps(index))


def only(folder: Path, name: str) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / name).write_bytes(b"x" * 100)


def without_weights(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)


def cut(file: Path, size: int) -> None:
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)


# name: (layout, how it is damaged, what the message says)
DAMAGE = {
    "no folder": ("single", shutil.rmtree, "DIR is not a checkpoint folder|DIR does not exist"),
    "no weights": ("single", lambda f: (f / "model.safetensors").unlink(), "DIR holds neither model.safetensors nor"),
    "empty folder": ("single", lambda f: [file.unlink() for file in f.iterdir()], "DIR holds neither"),
    "header cut": ("single", lambda f: cut(f / "model.safetensors", 100), "DIR/model.safetensors is truncated"),
    "length cut": ("single", lambda f: cut(f / "model.safetensors", 5), "DIR/model.safetensors is truncated"),
    "data cut": ("single", lambda f: cut(f / "model.safetensors", -1), "DIR/model.safetensors is truncated"),
    "empty file": ("single", lambda f: cut(f / "model.safetensors", 0), "DIR/model.safetensors is truncated"),
    "garbage": ("single", lambda f: only_garbage(f / "model.safetensors"), "or not a safetensors file"),
    "shard cut": ("sharded", lambda f: cut(first_shard(f), -1), "DIR/model-00001-of-.* is truncated"),
    "shard missing": ("sharded", lambda f: first_shard(f).unlink(), "places 'model.*' in model-00001-of-.* is missing"),
    "index garbage": ("sharded", lambda f: (f / INDEX).write_text("[1"), f"DIR/{INDEX} is not a safetensors index"),
    "index binary": ("sharded", lambda f: (f / INDEX).write_bytes(b"\xff\xfe"), f"DIR/{INDEX} is not a safetensors"),
    "index deep": ("sharded", lambda f: (f / INDEX).write_text("[" * 10**5), f"DIR/{INDEX} is not a safetensors"),
    "index a list": ("sharded", lambda f: (f / INDEX).write_text("[]"), f"DIR/{INDEX} is not a safetensors index"),
    "index without map": ("sharded", lambda f: (f / INDEX).write_text("{}"), "index: KeyError: 'weight_map'"),
    "index names a missing file": ("sharded", lambda f: edit_index(f, "x", "y"), "places 'x' in y, which is missing"),
    "index climbs out": ("sharded", lambda f: edit_index(f, "x", "../y"), r"'x' in '\.\./y': only a file name beside"),
    "index is absolute": ("sharded", lambda f: edit_index(f, "x", "/etc/passwd"), "'/etc/passwd': only a file name"),
    "index names the parent": ("sharded", lambda f: edit_index(f, "x", ".."), r"places 'x' in \.\., which is missing"),
    "index and file disagree": (
        "sharded",
        lambda f: edit_index(f, "x", first_shard(f).name),
        "places 'x' in model-00001-of-.*, which does not hold it",
    ),
    "pickle": ("single", lambda f: without_weights(f, "pytorch_model.bin"), "pytorch_model.bin, a pickle.*not read"),
    "pickle alone": ("single", lambda f: only(f, "pytorch_model.bin"), "pytorch_model.bin, a pickle"),
    "gguf": ("single", lambda f: without_weights(f, "q4.gguf"), "q4.gguf: turn it into .*`automodel convert`"),
    "gguf alone": ("single", lambda f: only(f, "q4.gguf"), "q4.gguf: turn it into"),
}


def only_garbage(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 8)


LOADERS = [SafetensorsReader, LlamaForCausalLM.from_pretrained, NeMoAutoModelForCausalLM.from_pretrained]


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_error_before_any_model_is_built(saved, tmp_path, monkeypatch, name):
    layout, damage, message = DAMAGE[name]
    folder = tmp_path / "broken"
    shutil.copytree(saved / layout, folder)
    damage(folder)
    monkeypatch.setattr(LlamaForCausalLM, "__init__", lambda *args, **kwargs: pytest.fail("a model was built"))
    for load in LOADERS:
        with pytest.raises(CheckpointError, match=re.compile(message.replace("DIR", str(folder)), re.DOTALL)):
            load(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_files_are_read_or_refused_never_anything_else(tmp_path, data):
    file = tmp_path / "fuzzed.safetensors"
    save_file({"a": torch.arange(6).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content))) if data.draw(st.booleans()) else None])
    with contextlib.suppress(CheckpointError):
        reader = SafetensorsReader(file)
        for key in reader:
            assert reader.read(key).shape == reader.shape(key)
