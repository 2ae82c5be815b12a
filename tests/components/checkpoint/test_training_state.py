"""`TrainingCheckpoints`: newest whole one first, pruned but for the best, written and read without pickle."""

import json
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch

from nemo_automodel.components.checkpoint import CheckpointError, TrainingCheckpoints, training_state
from nemo_automodel.components.checkpoint.training_state import random_state, restore_random_state

TENSORS = "shard-00001-model-00001-of-00001.safetensors"


def save(checkpoints, step, metric=None, value=0.0, **state):
    folder = checkpoints.save(
        step,
        write_files=lambda folder: (folder / "note.txt").write_text(f"step {step}"),
        tensors={"moment": torch.full((3,), value)},
        state=state,
        metric=metric,
    )
    checkpoints.wait()
    return folder


def moment(checkpoint):
    tensor = torch.zeros(3)
    checkpoint.load({"moment": tensor})
    return tensor.tolist()


def steps(checkpoints):
    return [int(folder.name.removeprefix("step-")) for folder in sorted(checkpoints.folder.iterdir())]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_was_saved_comes_back_bitwise_and_without_pickle(tmp_path, monkeypatch, asynchronous):
    checkpoints = TrainingCheckpoints(tmp_path / "run", asynchronous=asynchronous)
    assert checkpoints.latest() is None
    weight = torch.randn(4, 6)
    tensors = {
        "fp32": weight,
        "row": weight[1].clone(),
        "transposed": weight.clone().T,
        "bf16": weight.bfloat16(),
        "count": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(weight.clone()),
        **random_state(),
    }
    expected = {name: value.detach().clone() for name, value in tensors.items()}
    state = {"position": [1, {"epoch": 2}], "loss": 0.1 + 0.2, "name": "ünï"}
    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "dump"), (pickle, "dumps"), (torch, "load"), (torch, "save")]:  # noqa: E501  # fmt: skip
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("a pickle"))
    folder = checkpoints.save(12, tensors=tensors, state=state, metric=0.5)
    with torch.no_grad():
        for value in tensors.values():
            value.zero_()  # training goes on: what is saved is what was, not what is
    checkpoints.wait()
    found = TrainingCheckpoints(tmp_path / "run").latest()
    assert (found.folder, found.step, found.state) == (folder, 12, state)
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} == {".json", ".safetensors"}
    found.load(tensors)
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name


def test_random_numbers_go_on_where_they_were(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path)
    torch.rand(5)
    checkpoints.save(1, tensors=random_state(), state={})
    expected = torch.rand(7), torch.randperm(9), torch.nn.functional.dropout(torch.ones(50))
    torch.manual_seed(99)
    states = random_state()
    checkpoints.latest().load(states)
    restore_random_state(states)
    actual = torch.rand(7), torch.randperm(9), torch.nn.functional.dropout(torch.ones(50))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_every_rank_gets_its_own_generator_back(monkeypatch):
    """The state of a rank but the first is a view with an offset, which torch.set_rng_state misreads."""
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(torch.get_rng_state())
    for rank, seed in enumerate((1, 2)):
        monkeypatch.setattr(training_state, "Together", lambda rank=rank: SimpleNamespace(rank=rank))
        restore_random_state({"rng.cpu": torch.stack(states)})
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(seed)))


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
    checkpoints = TrainingCheckpoints(tmp_path, keep_last, asynchronous=True)
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
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "state.json").write_text("[]"),
        lambda folder: (folder / "state.json").write_text(json.dumps({"step": 2})),
        lambda folder: (folder / "note.txt").unlink(),
    ],
)
def test_a_damaged_checkpoint_is_never_taken_and_no_obstacle_to_saving(tmp_path, damage, caplog):
    checkpoints = TrainingCheckpoints(tmp_path)
    save(checkpoints, 1, value=1.0)
    damage(save(checkpoints, 2, metric=1.0))
    assert moment(checkpoints.latest()) == [1.0] * 3
    assert "step-00000002 is damaged" in caplog.text
    assert "going back to" in caplog.text
    save(checkpoints, 3)
    assert checkpoints.latest().step == 3


def test_a_damaged_newer_one_does_not_crowd_out_what_is_saved_after_it(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path, keep_last=1)
    save(checkpoints, 50)
    shutil.copytree(tmp_path / "step-00000050", tmp_path / "step-00000100")
    truncate(tmp_path / "step-00000100" / TENSORS)
    assert checkpoints.latest().step == 50
    save(checkpoints, 60)
    assert steps(checkpoints) == [60]


def test_with_damaged_ones_only_nothing_starts_over_in_silence(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path)
    truncate(save(checkpoints, 2) / TENSORS)
    with pytest.raises(CheckpointError, match=r"step-00000002 is damaged .*delete them all to start over"):
        checkpoints.latest()


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"other": torch.zeros(3)}, "Missing key in checkpoint state_dict: other"),
        ({"moment": torch.zeros(4)}, r"Size mismatch .* for moment"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, tensors, reason):
    checkpoints = TrainingCheckpoints(tmp_path)
    save(checkpoints, 1)
    with pytest.raises(CheckpointError, match=rf"step-00000001 cannot be loaded .*{reason}"):
        checkpoints.latest().load(tensors)


def test_a_save_that_failed_in_the_background_is_reported_by_the_next(tmp_path, monkeypatch):
    checkpoints = TrainingCheckpoints(tmp_path, asynchronous=True)
    save(checkpoints, 1)

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(training_state, "publish_folder", full)
        checkpoints.save(2, tensors={"moment": torch.zeros(3)}, state={})
        with pytest.raises(CheckpointError, match="no space left on device"):
            checkpoints.wait()
    assert checkpoints.latest().step == 1
    save(checkpoints, 3)
    assert steps(checkpoints) == [1, 3]


def test_the_same_step_again_replaces_the_whole(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path)
    (save(checkpoints, 1, value=1.0) / "stale.txt").write_text("old")
    save(checkpoints, 1, value=2.0)
    assert moment(checkpoints.latest()) == [2.0] * 3
    assert not (checkpoints.latest().folder / "stale.txt").exists()
