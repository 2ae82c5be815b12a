"""Saving: what is written equals what transformers writes, and whenever it stops, one whole save is found."""

import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from nemo_automodel.components.checkpoint import SafetensorsReader, publish_folder, write_shards, writing
from nemo_automodel.components.checkpoint.writing import parse_size
from tests.conftest import tiny, twins

INDEX = "model.safetensors.index.json"
SIZES = {"single": "5GB", "sharded": "20KB"}


def names_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("size", SIZES.values())
@pytest.mark.parametrize("tied", [False, True])
def test_files_equal_those_of_transformers(tmp_path, size, tied):
    hf, ours = twins(LlamaForCausalLM, tiny(tie_word_embeddings=tied))
    ours.save_pretrained(tmp_path / "ours", max_shard_size=size)
    hf.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    a, b = SafetensorsReader(tmp_path / "ours"), SafetensorsReader(tmp_path / "theirs")
    assert set(a) == set(b)
    assert ("lm_head.weight" in a) is not tied
    assert all(torch.equal(a.read(key), b.read(key)) for key in b)
    sharded = (tmp_path / "theirs" / INDEX).exists()
    assert (tmp_path / "ours" / INDEX).exists() is sharded
    if sharded:
        for folder in (tmp_path / "ours", tmp_path / "theirs"):
            index = json.loads((folder / INDEX).read_text())
            assert set(index["weight_map"].values()) == {file.name for file in folder.glob("*.safetensors")}
            assert index["metadata"]["total_size"] == sum(a.read(key).nbytes for key in a)
    ours_config, theirs = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs"))
    assert ours_config == theirs
    assert (tmp_path / "ours" / "generation_config.json").is_file()


@pytest.mark.parametrize(
    ("sizes", "limit", "shards"),
    [
        ([], 10, [[]]),
        ([4], 10, [["0"]]),
        ([5, 5, 1], 10, [["0", "1"], ["2"]]),
        ([4, 30, 4, 4], 10, [["0"], ["1"], ["2", "3"]]),
        ([30, 1], "10", None),
        ([3, 3, 3], 1, [["0"], ["1"], ["2"]]),
    ],
)
def test_shards_are_filled_in_order(tmp_path, sizes, limit, shards):
    tensors = [(str(i), torch.full((size,), i, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    if shards is None:
        with pytest.raises(ValueError, match="size '10' is neither"):
            write_shards(tmp_path, tensors, limit)
        return
    write_shards(tmp_path, iter(tensors), limit)
    assert [sorted(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))] == shards
    assert len(names_in(tmp_path)) == len(shards) + (len(shards) > 1)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), (" 1 kb", 1000), ("20MB", 2 * 10**7), (7, 7)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5", "5GiB", "-5GB", "1.5GB", "5GB5"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="neither a number of bytes"):
        parse_size(text)


def test_options_of_save_pretrained(tmp_path):
    _, model = twins(LlamaForCausalLM, tiny())
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    with pytest.raises(TypeError, match="does not take 'push_to_hub'"):
        model.save_pretrained(tmp_path / "other", push_to_hub=True)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "state", state_dict=state)
    back = type(model).from_pretrained(tmp_path / "state").state_dict()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_saving_onto_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file is a file; give a folder"):
        publish_folder(tmp_path / "file", lambda folder: None)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("replace", [False, True])
def test_a_save_that_fails_changes_nothing(tmp_path, error, replace):
    def fail(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        assert not (tmp_path / "new").exists()
        raise error

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").write_text("old")
    before = contents(tmp_path)
    for name in ("old", "new", "deep/er/new"):
        with pytest.raises(error):
            publish_folder(tmp_path / name, fail, replace=replace)
    assert contents(tmp_path) == before
    assert names_in(tmp_path) == {"old", "old/model.safetensors", "deep", "deep/er"}


@pytest.mark.parametrize("after", SIZES)
@pytest.mark.parametrize("before", SIZES)
def test_weights_of_an_earlier_save_go_and_other_files_stay(tmp_path, before, after):
    _, old = twins(LlamaForCausalLM, tiny(num_hidden_layers=3), seed=1)
    _, new = twins(LlamaForCausalLM, tiny(), seed=2)
    folder = tmp_path / "model"
    old.save_pretrained(folder, max_shard_size=SIZES[before])
    others = {"tokenizer.json": "{}", "notes.txt": "mine", "model_card.md": "x", "other.safetensors": "y"}
    for name, text in others.items():
        (folder / name).write_text(text)
    for _ in range(3):  # the names of shards take turns
        new.save_pretrained(folder, max_shard_size=SIZES[after])
        reader, index = SafetensorsReader(folder), folder / INDEX
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        indices = {INDEX} if index.exists() else set()
        assert names_in(folder) == {"config.json", "generation_config.json", *others, *named, *indices}
        assert all((folder / name).read_text() == text for name, text in others.items())
        assert set(reader) == set(new.state_dict_adapter.to_hf(new.state_dict()))
        back = AutoModelForCausalLM.from_pretrained(folder)
        assert all(torch.equal(reader.read(key), value) for key, value in back.state_dict().items())


class Killed(BaseException):
    """Stands for SIGKILL: no clean-up runs after it."""


def kill_at(monkeypatch, step: int) -> None:
    """Die at the ``step``-th change of a file name; what Python would still clean up stays."""
    count = 0

    def dying(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > step:
                raise Killed
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(writing, "sync_path", lambda path: None)  # slow, and changes nothing that can be seen
    for owner, name in [(os, "replace"), (Path, "rename"), (Path, "unlink"), (writing, "_sync"), (shutil, "rmtree")]:
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))


@pytest.mark.parametrize("after", SIZES)
@pytest.mark.parametrize("before", [*SIZES, "nothing"])
def test_killed_at_any_step_the_weights_are_all_old_or_all_new(tmp_path, before, after):
    """Read by this library and by transformers, at each of the steps that a save is made of."""
    (_, old), (_, new) = (twins(LlamaForCausalLM, tiny(num_hidden_layers=1), seed=seed) for seed in (1, 2))
    folder, seen = tmp_path / "model", []
    for step in range(100):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if before != "nothing":
            old.save_pretrained(folder, max_shard_size=SIZES[before])
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, step)
            try:
                new.save_pretrained(folder, max_shard_size=SIZES[after])
                finished = True
            except Killed:
                finished = False
        if before == "nothing" and not folder.exists():
            seen.append("none")
        else:
            seen.append(which(folder, {"old": old, "new": new}))
        new.save_pretrained(folder, max_shard_size=SIZES[after])  # clears away what was left
        assert not [name for name in names_in(tmp_path) if "incomplete" in name]
        assert which(folder, {"new": new}) == "new"
        if finished:
            break
    assert finished
    first = "none" if before == "nothing" else "old"
    assert seen == sorted(seen, key=(first, "new").index)
    assert {first, "new"} == set(seen)


def which(folder: Path, models: dict) -> str:
    """Which model the folder holds, bit for bit and by both libraries."""
    reader, theirs = SafetensorsReader(folder), AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, model in models.items():
        state = model.state_dict_adapter.to_hf(model.state_dict())
        if all(torch.equal(value, theirs[key]) for key, value in state.items()):
            assert set(reader) == set(state)
            assert all(torch.equal(value, reader.read(key)) for key, value in state.items())
            return name
    return pytest.fail(f"{names_in(folder)} is neither of {list(models)}")


def save_forever(models, folder: Path) -> None:
    while True:
        for model in models:
            for size in SIZES.values():
                model.save_pretrained(folder, max_shard_size=size)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    models = [twins(LlamaForCausalLM, tiny(num_hidden_layers=1), seed=seed)[1] for seed in (1, 2)]
    folder, end, kills = tmp_path / "model", time.monotonic() + 10, 0
    models[0].save_pretrained(folder)
    while time.monotonic() < end:
        process = multiprocessing.get_context("fork").Process(target=save_forever, args=(models, folder))
        process.start()
        time.sleep(random.uniform(0, 0.15))
        process.kill()
        process.join()
        kills += 1
        which(folder, dict(enumerate(models)))
    assert kills > 20
