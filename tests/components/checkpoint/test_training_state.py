"""`TrainingCheckpoints`: newest complete one first, pruned but for the best, readable without pickle."""

import json
import pickle
import shutil

import pytest
import torch

from nemo_automodel.components.checkpoint import CheckpointError, TrainingCheckpoints, training_state
from nemo_automodel.components.checkpoint.training_state import random_state, restore_random_state

TENSORS = "training_state.safetensors"


def save(checkpoints, step, metric=None, value=0.0, **state):
    return checkpoints.save(
        step,
        write_model=lambda folder: (folder.mkdir(), (folder / "model.txt").write_text(f"step {step}")),
        tensors={"moment": torch.full((3,), value)},
        state=state,
        metric=metric,
    )


def steps(checkpoints):
    return [int(folder.name.removeprefix("step-")) for folder in sorted(checkpoints.folder.iterdir())]


def test_what_was_saved_comes_back_bitwise_and_without_pickle(tmp_path, monkeypatch):
    checkpoints = TrainingCheckpoints(tmp_path / "run")
    assert checkpoints.latest() is None
    weight = torch.randn(4, 6)
    tensors = {
        "fp32": weight,
        "alias": weight,
        "row": weight[1],
        "transposed": weight.T,
        "bf16": weight.bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(weight.clone()),
        **random_state(),
    }
    state = {"position": [1, {"epoch": 2}], "loss": 0.1 + 0.2, "name": "ünï"}
    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "dump"), (pickle, "dumps"), (torch, "load"), (torch, "save")]:  # noqa: E501  # fmt: skip
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("a pickle"))
    folder = checkpoints.save(12, write_model=lambda f: f.mkdir(), tensors=tensors, state=state, metric=0.5)
    found = TrainingCheckpoints(tmp_path / "run").latest()
    assert (found.folder, found.step, found.state) == (folder, 12, state)
    assert found.model_folder == folder / "model"
    assert found.model_folder.is_dir()
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} == {".json", ".safetensors"}
    for name, value in tensors.items():
        assert found.tensors[name].dtype == value.dtype
        assert torch.equal(found.tensors[name], value)
        assert not found.tensors[name].requires_grad


def test_random_numbers_go_on_where_they_were(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path)
    torch.rand(5)
    checkpoints.save(1, write_model=lambda f: f.mkdir(), tensors=random_state(), state={})
    expected = torch.rand(7), torch.randperm(9), torch.nn.functional.dropout(torch.ones(50))
    torch.manual_seed(99)
    restore_random_state(checkpoints.latest().tensors)
    actual = torch.rand(7), torch.randperm(9), torch.nn.functional.dropout(torch.ones(50))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_latest_passes_over_what_is_not_complete(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path)
    save(checkpoints, 9)
    save(checkpoints, 10)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / ".step-00000011.incomplete")
    (tmp_path / "step-00000012").mkdir()
    (tmp_path / "step-00000013").write_text("a file")
    assert checkpoints.latest().step == 10


@pytest.mark.parametrize(
    ("keep_last", "metrics", "kept"),
    [
        (2, [None] * 5, [4, 5]),
        (1, [None], [1]),
        (1, [3.0, 1.0, 2.0, 4.0], [2, 4]),
        (2, [3.0, 1.0, 2.0, 4.0, 5.0], [2, 4, 5]),
        (2, [3.0, 2.0, 1.0], [2, 3]),
        (1, [2.0, 2.0, 2.0], [1, 3]),
        (1, [None, 2.0, None, None], [2, 4]),
        (1, [float("nan"), 2.0, 3.0, float("inf")], [2, 4]),
        (0, [3.0, 1.0, 2.0], [1, 2, 3]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep_last, metrics, kept):
    checkpoints = TrainingCheckpoints(tmp_path, keep_last)
    for step, metric in enumerate(metrics, 1):
        save(checkpoints, step, metric)
    assert steps(checkpoints) == kept
    assert checkpoints.latest().step == len(metrics)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-4])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: truncate(folder / TENSORS),
        lambda folder: (folder / TENSORS).unlink(),
        lambda folder: (folder / TENSORS).write_bytes(pickle.dumps({"moment": 1})),
        lambda folder: truncate(folder / "state.json"),
        lambda folder: (folder / "state.json").write_text("[]"),
        lambda folder: (folder / "state.json").write_text(json.dumps({"step": 2})),
    ],
)
def test_a_damaged_checkpoint_is_a_clear_error_and_no_obstacle_to_saving(tmp_path, damage):
    checkpoints = TrainingCheckpoints(tmp_path)
    save(checkpoints, 1)
    damage(save(checkpoints, 2, metric=1.0))
    with pytest.raises(CheckpointError, match=r"step-00000002 cannot be read \(.*the one before"):
        checkpoints.latest()
    save(checkpoints, 3)
    assert checkpoints.latest().step == 3


def test_the_same_step_again_replaces_the_whole(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path)
    (save(checkpoints, 1, value=1.0) / "model" / "stale.txt").write_text("old")
    save(checkpoints, 1, value=2.0)
    assert checkpoints.latest().tensors["moment"].tolist() == [2.0] * 3
    assert not (checkpoints.latest().model_folder / "stale.txt").exists()


@pytest.mark.parametrize("point", ["write", "discard", "prune"])
def test_an_interrupted_save_leaves_a_checkpoint_to_resume_from(tmp_path, monkeypatch, point):
    checkpoints = TrainingCheckpoints(tmp_path, keep_last=1)
    save(checkpoints, 1, value=1.0)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if point == "write":
            patch.setattr(training_state, "save_file", die)
        else:
            patch.setattr(shutil, "rmtree", lambda path, **kwargs: die() if path.exists() else None)
        with pytest.raises(KeyboardInterrupt):
            save(checkpoints, 1 if point == "discard" else 2, value=2.0)
    found = checkpoints.latest()
    step, value = {"write": (1, 1.0), "discard": (1, 2.0), "prune": (2, 2.0)}[point]
    assert (found.step, found.tensors["moment"].tolist()) == (step, [value] * 3)
    assert (found.model_folder / "model.txt").read_text() == f"step {step}"
    save(checkpoints, 3)
    assert steps(checkpoints) == [3], "the next save clears away what an interrupted one left"
