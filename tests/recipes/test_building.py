"""Meshes that a training refuses, before anything is built."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, GPT2Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nemo_automodel.components.distributed import Mesh, MeshConfig
from nemo_automodel.components.kernels import launch
from nemo_automodel.components.models.llama.model import LlamaForCausalLM
from nemo_automodel.components.together import Together
from nemo_automodel.config import load_config
from nemo_automodel.recipes import building
from nemo_automodel.recipes.meshes import build_mesh
from nemo_automodel.recipes.plan import plan, pretended
from nemo_automodel.recipes.served import served
from nemo_automodel.recipes.train import TrainConfig
from tests.recipes.conftest import checkpoint, overrides, rows  # noqa: F401  (fixtures)

REFUSED = [
    (6, {"mesh__tp": 4}, r"tp=4 takes a multiple of 4 ranks, and there are 6"),
    (8, {"mesh__tp": 2, "mesh__dp_shard": 2}, r"dp_shard=2 x tp=2 takes 4 ranks, and there are 8"),
    (4, {"mesh__tp": 4}, r"tp=4 does not divide the 2 KV heads; tp may be 2"),
    (4, {"mesh__cp": 2, "mesh__tp": 2}, r"cp=2 does not divide the 2 KV heads \(1 with tp=2\); leave it at 1"),
    (4, {"mesh__pp": 4}, r"pp=4 .*2 layers"),
    (2, {"mesh__pp": 2, "mesh__pp_schedule": "Interleaved1F1B"}, r"pp=2 makes 4 stages of the 2 layers"),
    (2, {"mesh__pp": 2, "train__micro_batch_size": 6}, r"not go with 1 micro.*=6 of the 6 .*; it may be 1, 2, 3, 4, 5"),
    (2, {"model__cpu_offload": "true"}, r"model.cpu_offload moves FSDP's shards off GPUs, and here is cpu, dp_shard=2"),
    (
        2,
        {"lora__base_dtype": "float8"},
        r"float8 is for .* whole on a GPU, not with mesh.dp_shard=2: .*mesh.dp_replicate",
    ),
    (2, {"lora__base_dtype": "float8", "mesh__cp": 2}, r"not with mesh.cp=2"),
    (2, {"lora__base_dtype": "float8", "mesh__tp": 2}, r"not with mesh.tp=2"),
    (
        2,
        {"mesh__tp": 2, "data__packing": "true", "data__max_length": 95},
        r"data.max_length=95 must be a multiple of 2",
    ),
]


@pytest.mark.parametrize(("ranks", "words", "message"), REFUSED)
def test_a_mesh_that_cannot_be_is_refused(
    overrides: Callable[..., list[str]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    words: dict[str, str],
    message: str,
) -> None:
    monkeypatch.setattr(Together, "__init__", lambda self, alone=False: self.__dict__.update(rank=0, size=ranks))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *group: 0)
    config = load_config(TrainConfig, None, overrides(**words))
    with pytest.raises(ValueError, match=message):
        build_mesh(config, torch.device("cpu"))


@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"])
def test_backward_passes_that_are_taken_apart_are_without_kernels(
    schedule: str,
    overrides: Callable[..., list[str]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a norm by the kernel, which has two outputs, torch would give the first one the gradients of both."""
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(launch, "triton", object())
    words = overrides(mesh__pp=2, mesh__pp_schedule=schedule, train__micro_batch_size=1)
    config, device = load_config(TrainConfig, None, words), torch.device("cpu")
    with pretended(0, 2):
        model = building.build_model(config, None, device, mesh=Mesh({"pp": 2}), stage=0, stages=2)
    apart = schedule != "1F1B"
    assert model.backend.kernels == ("torch" if apart else "auto")
    words = "torch: the schedule takes backward passes apart" if apart else "torch for norms of fewer"
    assert served(model, config.model, False)["norms"].startswith(words)


def test_models_that_do_not_say_how_wide_they_are_train_on_several_ranks(tmp_path: Path) -> None:
    GPT2Config(n_embd=32, n_layer=2, n_head=4, architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    words = {"output_dir": tmp_path / "run", "model.path": tmp_path, "data.train": "none", "train.device": "cpu"}
    config = load_config(TrainConfig, None, [word for key, value in words.items() for word in (f"--{key}", str(value))])
    assert all(needs.parameters and needs.activations for needs in plan(config, 2).ranks)
    config.mesh.tp = 2
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel, transformers' own class"):
        plan(config, 2)


def test_a_stage_that_was_drawn_on_the_host_goes_to_its_device(
    overrides: Callable[..., list[str]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved: list[torch.device] = []
    monkeypatch.setattr(LlamaForCausalLM, "to", lambda self, device: moved.append(device))
    config = load_config(TrainConfig, None, overrides(mesh__pp=2, model__from_scratch="true"))
    device = torch.device("cuda", 1)
    with pretended(0, 2):
        building.build_model(config, None, device, mesh=Mesh({"pp": 2}), stage=0, stages=2)
    assert moved == [device]


def test_a_size_below_one_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"cp=0 must be at least 1"):
        MeshConfig(cp=0)
    assert MeshConfig(tp=2).sizes(8) == {"pp": 1, "dp_replicate": 1, "dp_shard": 4, "cp": 1, "tp": 2}


def test_an_attention_of_somebodys_own_decides_before_the_backend(overrides: Callable[..., list[str]]) -> None:  # noqa: F811
    AttentionInterface.register("somebodys", sdpa_attention_forward)
    words = overrides(model__attn_implementation="somebodys", model__backend__attn="varlen")
    model = building.build_model(load_config(TrainConfig, None, words), None, torch.device("cpu"))
    assert model.config._attn_implementation == "somebodys"
