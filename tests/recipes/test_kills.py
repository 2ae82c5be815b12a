"""A hundred SIGKILLs at random moments: every run resumes, and ends where the uninterrupted one does."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_automodel.components.checkpoint import TrainingCheckpoints
from nemo_automodel.config import load_config
from nemo_automodel.recipes.train import TrainConfig, train
from tests.distributed.ranks import SERVER

KILLS = 100
STEPS = 12


def _train(words: list[str]) -> None:
    torch.set_num_threads(1)
    train(load_config(TrainConfig, None, words), say=lambda line: None)


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    """Saving at every step, so that most kills hit a save, from the start of the process to its end."""
    options = {"train__max_steps": STEPS, "train__epochs": 1, "train__save_every": 1, "train__keep_last": 2}
    words = overrides("whole", **options)
    warm = SERVER.Process(target=time.sleep, args=(0,))  # the server's imports are no part of a run
    warm.start()
    warm.join()
    started = time.monotonic()
    process = SERVER.Process(target=_train, args=(words,))
    process.start()
    process.join()
    seconds = time.monotonic() - started
    expected = load_file(tmp_path / "whole" / "hf" / "model.safetensors")
    expected_losses = [
        json.loads(row)["loss"] for row in (tmp_path / "whole" / "metrics.jsonl").read_text().split("\n") if row
    ]

    chance, kills, runs, at = random.Random(0), 0, 0, set()
    while kills < KILLS:
        out = f"killed-{runs}"
        while True:
            process = SERVER.Process(target=_train, args=(overrides(out, **options),))
            process.start()
            process.join(chance.uniform(0, seconds))
            if not process.is_alive():
                assert process.exitcode == 0
                break
            process.kill()
            process.join()
            kills += 1
            found = TrainingCheckpoints(tmp_path / out / "checkpoints").latest()
            at.add(found.step if found else 0)
        actual = load_file(tmp_path / out / "hf" / "model.safetensors")
        assert all(torch.equal(actual[name], value) for name, value in expected.items())
        rows = (tmp_path / out / "metrics.jsonl").read_text().split("\n")
        assert [json.loads(row)["loss"] for row in rows if row] == expected_losses
        runs += 1
    assert len(at) > 4, f"the kills came at the same few steps: {sorted(at)}"
    print(f"{kills} kills over {runs} runs, at steps {sorted(at)}")
