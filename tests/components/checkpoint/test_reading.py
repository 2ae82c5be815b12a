"""`SafetensorsReader`: what it reads equals what safetensors reads; what is damaged is one clear error."""

import gc
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
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


def only(folder: Path, name: str) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / name).write_bytes(b"x" * 100)


def without_weights(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)


# name: (how the only file of weights is taken away, what the message says); damaged files are in test_corrupt.py
DAMAGE = {
    "no folder": (shutil.rmtree, "DIR is not a checkpoint folder|DIR does not exist"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "DIR holds neither model.safetensors nor"),
    "empty folder": (lambda f: [file.unlink() for file in f.iterdir()], "DIR holds neither"),
    "pickle": (lambda f: without_weights(f, "pytorch_model.bin"), "pytorch_model.bin, a pickle.*not read"),
    "pickle alone": (lambda f: only(f, "pytorch_model.bin"), "pytorch_model.bin, a pickle"),
    "gguf": (lambda f: without_weights(f, "q4.gguf"), "q4.gguf: turn it into .*`automodel convert`"),
    "gguf alone": (lambda f: only(f, "q4.gguf"), "q4.gguf: turn it into"),
}


LOADERS = [SafetensorsReader, LlamaForCausalLM.from_pretrained, NeMoAutoModelForCausalLM.from_pretrained]


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_there_instead_of_a_checkpoint_is_named(saved, tmp_path, name):
    damage, message = DAMAGE[name]
    folder = tmp_path / "broken"
    shutil.copytree(saved / "single", folder)
    damage(folder)
    for load in LOADERS:
        with pytest.raises(CheckpointError, match=re.compile(message.replace("DIR", str(folder)), re.DOTALL)):
            load(folder)


def test_a_tensor_that_the_index_forgot_is_read_as_in_transformers(saved, tmp_path):
    shutil.copytree(saved / "sharded", tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "model.norm.weight" in SafetensorsReader(tmp_path)
    assert NeMoAutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight.tolist() == [1.0] * 32


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_links_of_the_hub_cache_and_links_to_a_folder_are_followed(saved, tmp_path, layout):
    """``snapshots/<revision>/<name>`` leads to ``blobs/<hash>``; a user's link may lead to the snapshot."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copytree(saved / layout, blobs)
    for number, file in enumerate(sorted(blobs.iterdir())):
        blob = file.rename(blobs / f"blob{number}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    (tmp_path / "mine").symlink_to(snapshot)
    (tmp_path / "one.safetensors").symlink_to(saved / "single" / "model.safetensors")
    for path in (snapshot, tmp_path / "mine", tmp_path / "one.safetensors"):
        assert len(SafetensorsReader(path)) == len(SafetensorsReader(saved / "single"))
    assert NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "mine").num_parameters()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_finite_values_are_asked_for_by_name_and_place(tmp_path, dtype):
    values = torch.full((5, 4), 400.0).to(dtype)
    save_file(
        {"before": torch.ones(3), "x": values, "int": torch.ones(2, dtype=torch.int8)}, tmp_path / "a.safetensors"
    )
    reader = SafetensorsReader(tmp_path / "a.safetensors", check_finite=True)
    assert {key: reader.read(key).numel() for key in reader} == {"before": 3, "x": 20, "int": 2}
    reader.read_into(torch.empty(0), "x")
    values[3, 1] = float("nan")
    save_file({"before": torch.ones(3), "x": values}, tmp_path / "a.safetensors")
    reader = SafetensorsReader(tmp_path / "a.safetensors", check_finite=True)
    reader.read_into(torch.empty(3, 4), "x")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: tensor 'x' holds nan at element 13"):
        reader.read_into(torch.empty(4, 2, dtype=dtype).T, "x", start=8)
    assert SafetensorsReader(tmp_path / "a.safetensors").read("x").float().isnan().sum() == 1


@pytest.mark.parametrize(("start", "size"), [(-1, 2), (0, 7), (5, 2), (7, 0)])
def test_ranges_outside_of_a_tensor_are_refused(tmp_path, start, size):
    save_file({"x": torch.zeros(6), "y": torch.ones(6)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"x: elements .* of a tensor of shape \[6\]"):
        SafetensorsReader(tmp_path / "a.safetensors").read_into(torch.empty(size), "x", start)


def test_a_file_that_may_not_be_read(saved, tmp_path, monkeypatch):
    shutil.copytree(saved / "single", tmp_path, dirs_exist_ok=True)

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root may read what chmod forbids
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: .*Permission denied"):
        SafetensorsReader(tmp_path)
