"""Weights in and out of meshes, bitwise, against the single process and against transformers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.checkpoint import SafetensorsReader, write_shards, writing
from nemo_automodel.components.layout import Fusion
from nemo_automodel.components.together import AnotherRankFailed, Together
from tests.conftest import randomize, tiny
from tests.distributed.meshes import sharding
from tests.distributed.ranks import run_ranks

# 3 KV heads, head_dim not hidden/heads, an odd MLP and vocabulary: shards cut through groups, blocks and pairs
SHAPES: dict[str, Any] = {
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "hidden_size": 36,
    "intermediate_size": 45,
    "vocab_size": 61,
    "attention_bias": True,
}
EVEN: dict[str, Any] = SHAPES | {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 44,
    "hidden_size": 40,
}
MESHES = ["fsdp=2", "fsdp=3", "fsdp=4", "hsdp=2x2", "tp=2", "tp=4", "fsdp=2,tp=2"]


def _world(mesh: str) -> int:
    sizes = [int(size) for part in mesh.split(",") for size in part.partition("=")[2].split("x")]
    return int(torch.tensor(sizes).prod())


def _checkpoint(folder: Path, mesh: str, **changes: Any) -> Path:
    shapes = (EVEN if "tp" in mesh else SHAPES) | changes
    if qwen := shapes.pop("qwen", False):
        shapes.pop("attention_bias")
    config = tiny(Qwen2Config if qwen else LlamaConfig, **shapes)
    model = randomize((Qwen2ForCausalLM if qwen else LlamaForCausalLM)(config))
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def _load(folder: Path, mesh: str, dtype: str) -> dict[str, torch.Tensor]:
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, dtype=dtype, prepare=sharding(mesh))
    whole = NeMoAutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    sharded = model.state_dict()
    assert sharded.keys() == whole.keys()
    assert any(isinstance(value, DTensor) for value in sharded.values())
    for name, value in sharded.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        assert torch.equal(full, whole[name]), name
    if model.config.tie_word_embeddings:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    return {}


@pytest.mark.parametrize("mesh", MESHES)
def test_every_rank_loads_its_own_shard(tmp_path: Path, mesh: str) -> None:
    run_ranks(_world(mesh), _load, _checkpoint(tmp_path, mesh), mesh, "float32")


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"qwen": True}], ids=["tied", "qwen2"])
def test_tied_heads_and_casts(tmp_path: Path, changes: dict[str, Any]) -> None:
    run_ranks(2, _load, _checkpoint(tmp_path, "fsdp=2", **changes), "fsdp=2", "bfloat16")


def _save(source: Path, target: Path, mesh: str) -> None:
    model = NeMoAutoModelForCausalLM.from_pretrained(source, prepare=sharding(mesh))
    model.save_pretrained(target, max_shard_size="20KB")


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_mesh_saves_what_transformers_wrote(tmp_path: Path, mesh: str, tied: bool) -> None:
    source, target = _checkpoint(tmp_path / "hf", mesh, tie_word_embeddings=tied), tmp_path / "saved"
    run_ranks(_world(mesh), _save, source, target, mesh)
    expected, actual = (LlamaForCausalLM.from_pretrained(folder) for folder in (source, target))
    for (name, value), other in zip(actual.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    read, written = SafetensorsReader(source), SafetensorsReader(target)
    assert set(read) == set(written)
    assert len(list(target.glob("model-*-of-*.safetensors"))) > 2
    assert not list(tmp_path.glob(".*"))
    assert not list(target.glob("shard-*"))


def _save_failing_on_rank_1(source: Path, target: Path, where: str) -> str:
    model = NeMoAutoModelForCausalLM.from_pretrained(source, prepare=sharding("fsdp=2"))
    if dist.get_rank() == 1:
        if where == "on the way to the host":
            writing.whole = lambda tensor: SimpleNamespace(nbytes=0, to=_no_space)
        else:
            holder, name = (Fusion, "split") if where == "while splitting" else (writing, "save_file")
            setattr(holder, name, _no_space)
    with pytest.raises((OSError, AnotherRankFailed)) as raised:
        model.save_pretrained(target, max_shard_size="20KB")
    return str(raised.value)


def _no_space(*args: Any) -> None:
    raise OSError("no space left on device")


@pytest.mark.parametrize("where", ["while splitting", "on the way to the host", "while writing"])
def test_a_rank_that_cannot_write_stops_all_and_nothing_is_published(tmp_path: Path, where: str) -> None:
    source = _checkpoint(tmp_path / "hf", "fsdp=2")
    others, its_own = run_ranks(2, _save_failing_on_rank_1, source, tmp_path / "saved", where, timeout=120)
    assert its_own == "no space left on device"
    assert "another rank failed" in others
    assert not list(tmp_path.glob("*saved*"))


def _write_sharded_tensors(folder: Path) -> str:
    mesh = init_device_mesh("cpu", (2,))
    sizes = [4, 8, 12, 16, 20]  # a shard each
    tensors = [(str(size), distribute_tensor(torch.ones(size), mesh, [Shard(0)])) for size in sizes]
    if dist.get_rank() == 1:
        writing.save_file = _no_space
    with pytest.raises((OSError, AnotherRankFailed)) as raised:
        write_shards(folder, tensors, 1, Together())
    return str(raised.value)


def test_a_rank_that_could_not_write_gathers_the_tensor_in_hand_too(tmp_path: Path) -> None:
    others, its_own = run_ranks(2, _write_sharded_tensors, tmp_path, timeout=120)
    assert its_own == "no space left on device"
    assert "another rank failed" in others
