"""Adapters of peft on two ranks: peft's logits, and merged weights that give them again."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.peft import merge_lora
from tests.components.peft.test_adapter import CASES, trained
from tests.conftest import assert_near, tokens
from tests.distributed.meshes import sharding
from tests.distributed.ranks import run_ranks


def _shard(model: Any, mesh: str) -> None:
    if mesh == "fsdp=2":
        sharding(mesh)(model)
        return
    plan: dict[str, Any] = {f"model.layers.{i}.mlp.gate_up_proj": ColwiseParallel() for i in range(2)}
    plan |= {f"model.layers.{i}.mlp.down_proj": RowwiseParallel() for i in range(2)}
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


@torch.no_grad()
def _compute_and_merge(folder: Path, mesh: str) -> numpy.ndarray:
    used, fresh = (
        NeMoAutoModelForCausalLM.from_pretrained(
            folder / "base", adapter=folder / "adapter", prepare=lambda model: _shard(model, mesh)
        )
        for _ in range(2)
    )
    logits = used(tokens(2, 9)).logits
    for name, model in {"used": used, "fresh": fresh}.items():  # FSDP leaves the root's weights gathered after use
        merge_lora(model)
        model.save_pretrained(folder / name)
    return logits.numpy()


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        ("head and norms saved", "fsdp=2"),
        ("head and norms saved", "tp=2"),
        ("embedding saved", "fsdp=2"),
        ("embedding saved", "tp=2"),
        ("head adapted", "fsdp=2"),
        ("dora, patterns, all biases", "fsdp=2"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_sharded_logits_are_pefts_and_merged_again(case: str, mesh: str, tmp_path: Path) -> None:
    """The base is tied: what comes with the adapter, or is merged, must not reach the other of head and embedding."""
    hf, _, theirs = trained(tmp_path / "adapter", CASES[case])
    hf.save_pretrained(tmp_path / "base")
    expected = theirs.eval()(tokens(2, 9)).logits.detach()
    assert (hf(tokens(2, 9)).logits - expected).abs().max() > 0.05
    for logits in run_ranks(2, _compute_and_merge, tmp_path, mesh):
        assert_near(torch.from_numpy(logits), expected, what="sharded")
    for name in ("used", "fresh"):
        assert_near(type(hf).from_pretrained(tmp_path / name)(tokens(2, 9)).logits, expected, what=name)
