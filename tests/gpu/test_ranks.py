"""Ranks on GPUs of their own, through NCCL: trainings equal one GPU's, and attention in a ring rounds as sdpa does.

Run on a machine with two GPUs with ``pytest -m gpu tests/gpu/test_ranks.py``.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file

from nemo_automodel.components.distributed import part_of
from nemo_automodel.components.distributed.ring import ring_attention
from tests.distributed.equality import SHAPE, differences, options_of, record, words_of
from tests.distributed.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

MESHES: list[dict[str, Any]] = [{"cp": 2}, {"tp": 2}, {"dp_shard": 2}, {"dp_replicate": 2}]
SCHEDULES = ("1F1B", "Interleaved1F1B", "ZBVZeroBubble")
PIPELINES: list[dict[str, Any]] = [{"pp": 2, "pp_schedule": schedule} for schedule in SCHEDULES]
PACKED = {"data__packing": "true", "data__max_length": 96}
ADAPTERS = {"lora__r": 8}  # which are joined with their weights


def _through_nccl(folder: Path, function: Callable[..., None], *args: Any) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    os.environ["LOCAL_RANK"] = str(rank)
    torch.cuda.set_device(rank)
    store = f"file://{folder}/store-of-nccl"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=store, rank=rank, world_size=ranks)
    function(*args)
    dist.destroy_process_group()


def _train(folder: Path, mesh: dict[str, Any], **options: Any) -> None:
    """On one GPU, and on two."""
    chosen = options_of(folder, "llama", False, train__device="cuda", **options)
    record(words_of({**chosen, "output_dir": folder / "one"}), folder / "one-tensors")
    on_mesh = {f"mesh.{name}": value for name, value in mesh.items()}
    words = words_of({**chosen, **on_mesh, "output_dir": folder / "several"})
    run_ranks(2, _through_nccl, folder, record, words, folder / "tensors", timeout=300, method="spawn")


@pytest.mark.parametrize("mesh", [*MESHES, *PIPELINES], ids=str)
def test_two_gpus_train_what_one_trains(mesh: dict[str, Any], tmp_path: Path) -> None:
    _train(tmp_path, mesh, model__dtype="float32", model__backend__kernels="torch", **PACKED)
    found = differences(tmp_path / "one-tensors", tmp_path / "tensors")
    worst = max(found, key=lambda name: found[name])
    assert found[worst] < 1e-4, f"{worst} differs by {found[worst]}"


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ({"cp": 2}, PACKED),
        ({"cp": 2, "cp_method": "ring"}, {}),
        ({"tp": 2}, PACKED),
        (PIPELINES[-1], {}),
        ({"dp_replicate": 2}, ADAPTERS),
        ({"dp_replicate": 2}, {**ADAPTERS, "lora__base_dtype": "float8"}),
        (PIPELINES[0], ADAPTERS),
    ],
    ids=str,
)
def test_two_gpus_train_in_half_precision(
    mesh: dict[str, Any], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPE, "head_dim", 16)  # flash attention takes multiples of 8, float8 of 16
    monkeypatch.setitem(SHAPE, "intermediate_size", 48)
    _train(tmp_path, mesh, model__dtype="bfloat16", **options)
    one, several = (load_file(tmp_path / name / "0.safetensors") for name in ("one-tensors", "tensors"))
    torch.testing.assert_close(several["loss"], one["loss"], rtol=1e-2, atol=0)
    torch.testing.assert_close(several["norm 0"].cpu(), one["norm 0"].cpu(), rtol=3e-2, atol=0)


def _ring_beside_sdpa() -> None:
    torch.manual_seed(0)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = [torch.randn(2, heads, 1024, 64, device="cuda").bfloat16() for heads in (8, 2, 2, 8)]
    exact, rounded = (
        [x.to(dtype, copy=True).requires_grad_() for x in whole[:3]] for dtype in (torch.float32, torch.bfloat16)
    )
    parts = [part_of(x, rank, ranks, 2, balanced=True).requires_grad_() for x in whole[:3]]
    group = dist.group.WORLD
    assert group is not None
    outputs = [
        F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True),
        F.scaled_dot_product_attention(*rounded, is_causal=True, enable_gqa=True),
        ring_attention(*parts, None, group),
    ]
    for output, gradient in zip(outputs, (whole[3], whole[3], part_of(whole[3], rank, ranks, 2, True)), strict=True):
        output.backward(gradient.to(output.dtype))
    made = [[output, *(x.grad for x in of)] for output, of in zip(outputs, (exact, rounded, parts), strict=True)]
    for name, right, by_sdpa, by_ring in zip(("output", "query", "key", "value"), *made, strict=True):
        right, by_sdpa = (part_of(x, rank, ranks, 2, balanced=True) for x in (right, by_sdpa.float()))
        error, usual = ((x - right).norm() / right.norm() for x in (by_ring.float(), by_sdpa))
        assert error < 1.5 * usual, f"{name}: {error} of the ring, {usual} of sdpa"


def test_attention_in_a_ring_rounds_as_sdpa_does(tmp_path: Path) -> None:
    run_ranks(2, _through_nccl, tmp_path, _ring_beside_sdpa, timeout=300, method="spawn")
