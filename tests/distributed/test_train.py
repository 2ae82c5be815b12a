"""The training loop on several ranks against one process, and resumed on other numbers of ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_automodel.components.checkpoint import SafetensorsReader
from nemo_automodel.config import load_config
from nemo_automodel.recipes.export import export_checkpoint
from nemo_automodel.recipes.train import TrainConfig, train
from tests.distributed.ranks import run_ranks
from tests.recipes.conftest import checkpoint, overrides, rows  # noqa: F401  (fixtures)

Overrides = Callable[..., list[str]]
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora__r": 4, "lora__targets": "[q_proj, v_proj, down_proj]"},
    "dora packed": {
        "lora__r": 4,
        "lora__dora": "true",
        "data__packing": "true",
        "data__max_length": 128,
        "train__batch_size": 3,
    },
    "bf16 with masters": {"model__dtype": "bfloat16"},
    "bf16 alone": {"model__dtype": "bfloat16", "optim__masters": "stochastic", "optim__moments": "bfloat16"},
}


def _train(words: list[str]) -> None:
    train(load_config(TrainConfig, None, words), say=lambda line: None)


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = SafetensorsReader(folder)
    return {key: reader.read(key) for key in reader}


@pytest.mark.ranks
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_train_what_one_process_trains(
    overrides: Overrides,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
    name: str,
    ranks: int,
) -> None:
    """The batch of 6 rows (5 left at an epoch's end) does not divide evenly: some rank has no row of its own."""
    options = {
        "train__device": "cpu",
        "train__max_steps": 5,
        "train__save_every": 5,
        "data__validation": rows,
        **OPTIONS[name],
    }
    _train(overrides("one", **options))
    run_ranks(ranks, _train, overrides("several", **options))
    # the order of additions differs; bf16 gradients are rounded once a rank and micro-batch
    tolerance = 2e-2 if "bf16" in name else 1e-4
    assert _losses(tmp_path / "several") == pytest.approx(_losses(tmp_path / "one"), rel=tolerance)
    rows_of = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("one", "several")]
    last = [json.loads(lines[-1]) for lines in rows_of]
    assert last[1]["val_loss"] == pytest.approx(last[0]["val_loss"], rel=tolerance)
    assert last[1]["grad_norm"] == pytest.approx(last[0]["grad_norm"], rel=20 * tolerance)
    one, several = (_weights(tmp_path / run / "hf") for run in ("one", "several"))
    assert one.keys() == several.keys()
    for key, value in one.items():
        # Adam divides by sqrt(v): where gradients are tiny, rounding becomes a share of lr = 1e-2; and without masters,
        # other ranks draw otherwise: five times up to half a spacing (2^-7 at one), to and fro
        bound = 2**-7 if "alone" in name else 1e-3
        assert (several[key].float() - value.float()).abs().mean() < bound, key
    if "lora" in "".join(options):
        assert (tmp_path / "several" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["full", "lora", "bf16 with masters", "bf16 alone"])
def test_a_run_goes_on_with_other_ranks(
    overrides: Overrides,  # noqa: F811
    tmp_path: Path,
    name: str,
) -> None:
    """Three steps on two ranks, three on one, three on four: the data goes on where it was, and so do the moments."""
    options = {"train__device": "cpu", "train__save_every": 3, **OPTIONS[name]}
    _train(overrides("whole", train__max_steps=9, **options))
    for ranks in (2, 1, 4):
        stop = 3 * ((2, 1, 4).index(ranks) + 1)
        run_ranks(ranks, _train_until, overrides("moved", train__max_steps=9, **options), stop)
    losses = _losses(tmp_path / "moved")
    assert len(losses) == 9
    assert losses == pytest.approx(_losses(tmp_path / "whole"), rel=5e-2 if "bf16" in name else 1e-3)
    exported = export_checkpoint(tmp_path / "moved", tmp_path / "exported")
    kind = "adapter" if name == "lora" else "hf"
    expected, actual = _weights_of(tmp_path / "moved" / kind), _weights_of(exported)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def _weights_of(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "adapter_model.safetensors"
    return _weights(adapter if adapter.is_file() else folder)


def _train_until(words: list[str], stop: int) -> None:
    """As if SIGTERM came to the leading rank alone in step ``stop``: all ranks save that step and end."""
    import os
    import signal

    import torch.distributed as dist

    from nemo_automodel.recipes import train as recipe

    step = recipe.Run.step

    def interrupted(self: Any, number: int) -> dict[str, float]:
        if number == stop and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    recipe.Run.step = interrupted  # type: ignore[method-assign]
    try:
        _train(words)
    except KeyboardInterrupt:
        assert stop < 9
