"""Copies of a parameter that drifted apart are found, and named."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from nemo_automodel.components.distributed import Mesh, diverged
from nemo_automodel.components.distributed.replicas import DRAWS, fingerprint
from nemo_automodel.components.optim import MasterAdamW
from nemo_automodel.config import load_config
from nemo_automodel.recipes.train import TrainConfig, TrainingError, train
from tests.distributed.equality import options_of, words_of
from tests.distributed.ranks import run_ranks


def test_a_fingerprint_sees_every_bit_and_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_automodel.components.distributed.replicas.PIECE", 8)
    x = torch.randn(5, 7)
    same = fingerprint(x)
    assert fingerprint(x.clone()) == same
    for place in range(x.numel()):
        other = x.clone()
        other.view(torch.int32).view(-1)[place] ^= 1
        assert fingerprint(other) != same
    assert fingerprint(x.flip(0)) != same
    assert fingerprint(x.bfloat16()) != fingerprint((x * 1.01).bfloat16())


def _on_a_rank() -> list[Any]:
    mesh, rank = Mesh({"dp_replicate": 2, "tp": 2}), dist.get_rank()
    of_tp = mesh.axis("tp")
    torch.manual_seed(0)
    tensors = {
        "plain": torch.randn(3),
        "cut": distribute_tensor(torch.randn(4, 3), of_tp, [Shard(0)]),
        "whole": distribute_tensor(torch.randn(4, 3), of_tp, [Replicate()]),
    }
    found = [diverged(tensors, mesh)]
    for name in tensors:
        local = tensors[name] if name == "plain" else tensors[name].to_local()
        local.view(-1)[-1] += float(rank == 3)
        found.append(diverged(tensors, mesh))
        local.view(-1)[-1] -= float(rank == 3)
        local.copy_(local.round(decimals=3))
    torch.manual_seed(int(rank == 3))
    found.append(diverged(tensors, mesh))
    return found


def test_what_drifted_is_named_with_its_axis() -> None:
    """Rank 3's neighbours along dp_replicate and tp are 1 and 2; a cut parameter has copies along dp_replicate only."""
    results = run_ranks(4, _on_a_rank)
    assert [rank[0] for rank in results] == [{}] * 4
    for which, name in enumerate(("plain", "cut", "whole"), 1):
        cut = name == "cut"
        assert results[0][which] == {}
        assert results[1][which] == {name: "dp_replicate"}
        assert results[2][which] == ({} if cut else {name: "tp"})
        assert results[3][which] == {name: "dp_replicate" if cut else "dp_replicate, tp"}
    assert [rank[4] for rank in results] == [{}, {}, {DRAWS: "tp"}, {DRAWS: "tp"}]


def _drifts(words: list[str], name: str) -> str:
    step = MasterAdamW.step

    def drifting(self: MasterAdamW, lr: float) -> torch.Tensor:
        norm = step(self, lr)
        with torch.no_grad():
            self.parameters[name].view(-1)[0] += 1e-6 * dist.get_rank()
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MasterAdamW, "step", drifting)
        with pytest.raises(TrainingError) as raised:
            train(load_config(TrainConfig, None, words), say=lambda line: None)
    return str(raised.value)


@pytest.mark.parametrize(("axis", "name"), [("tp", "model.norm.weight"), ("pp", "model.embed_tokens.weight")])
def test_a_training_whose_copies_drift_stops_at_once(axis: str, name: str, tmp_path: Path) -> None:
    options = options_of(tmp_path, "llama", True, **{"output_dir": tmp_path / "run", f"mesh.{axis}": 2})
    for message in run_ranks(2, _drifts, words_of(options), name):
        assert message.startswith(f"step 1: ranks no longer hold the same {name} (along {axis})")
