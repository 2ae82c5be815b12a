"""Training on a mesh of each kind is training in one process."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from nemo_automodel.config import load_config
from nemo_automodel.recipes.building import build_parts
from nemo_automodel.recipes.meshes import build_mesh
from nemo_automodel.recipes.train import TrainConfig
from tests.distributed.equality import (
    SABOTAGE,
    assert_equal_training,
    export_untrained,
    options_of,
    record,
    weights,
    words_of,
)
from tests.distributed.ranks import run_ranks

LORA = {"lora__r": 4}
DORA = {**LORA, "lora__dora": "true"}
FLOAT8 = {**LORA, "lora__base_dtype": "float8", "train__max_steps": 2}
PACKED = {"data__packing": "true", "data__max_length": 96}
RING = {"mesh__cp_method": "ring"}
NO_SEQUENCE = {"mesh__sequence_parallel": "false"}
BUBBLE = {"mesh__pp_schedule": "InterleavedZeroBubble"}
V = {"mesh__pp_schedule": "ZBVZeroBubble"}
EACH = {"mesh__pp_reduce_each": "true"}
Case = tuple[str, dict[str, int], dict[str, Any]]
TELLING: list[Case] = [
    ("llama tied", {"tp": 2}, {}),
    ("llama tied", {"pp": 2}, {}),
    ("qwen2 tied", {"cp": 2, "dp_shard": 2}, {**LORA, **PACKED, "model__attn_implementation": "eager"}),
]
"""In the default suite."""

CASES: list[Case] = [
    ("qwen2 untied", {"tp": 4}, NO_SEQUENCE),
    ("llama untied", {"dp_replicate": 2, "dp_shard": 2}, PACKED),
    ("qwen2 tied", {"tp": 2, "dp_shard": 2}, {"model__gradient_checkpointing": "selective"}),
    ("qwen2 untied", {"tp": 2}, {**DORA, **PACKED}),
    ("llama tied", {"tp": 2, "dp_shard": 2}, LORA),
    ("phi3 untied", {"tp": 2}, DORA),
    ("llama tied", {"dp_replicate": 2}, FLOAT8),
    ("llama tied", {"cp": 4}, PACKED),
    ("llama untied", {"cp": 2, "tp": 2}, PACKED),
    ("qwen2 untied", {"cp": 2}, RING),
    ("qwen2 tied", {"pp": 2, "dp_shard": 2}, V),
    ("qwen2 untied", {"pp": 2, "tp": 2}, {"mesh__pp_schedule": "Interleaved1F1B"}),
    ("llama tied", {"pp": 2, "dp_shard": 2}, {**DORA, **PACKED, **BUBBLE}),
]
MORE: list[Case] = [
    ("llama tied", {"tp": 4}, {"model__gradient_checkpointing": "true"}),
    ("qwen2 tied", {"tp": 2}, {**LORA, **NO_SEQUENCE}),
    ("qwen2 untied", {"tp": 2}, {**DORA, **NO_SEQUENCE}),
    ("llama untied", {"dp_replicate": 2, "tp": 2}, {**LORA, **PACKED}),
    ("qwen2 untied", {"dp_replicate": 4}, {}),
    ("llama tied", {"dp_replicate": 2}, LORA),
    ("qwen2 tied", {"pp": 2, "dp_replicate": 2}, FLOAT8),
    ("qwen2 untied", {"cp": 2}, {"model__gradient_checkpointing": "true"}),
    ("llama tied", {"cp": 2}, {**PACKED, "model__gradient_checkpointing": "selective"}),
    ("qwen2 tied", {"cp": 2, "tp": 2}, {**LORA, **NO_SEQUENCE}),
    ("llama tied", {"cp": 2, "tp": 2}, {**DORA, **PACKED}),
    ("llama tied", {"cp": 4}, {**RING, "model__gradient_checkpointing": "selective"}),
    ("qwen2 tied", {"cp": 2, "tp": 2}, {**RING, **LORA}),
    ("llama tied", {"cp": 2, "dp_shard": 2}, RING),
    ("llama untied", {"pp": 2}, {"mesh__pp_schedule": "GPipe"}),
    ("llama tied", {"pp": 2}, {"mesh__pp_schedule": "Interleaved1F1B"}),
    ("llama tied", {"pp": 2}, BUBBLE),
    ("llama tied", {"pp": 2}, {**V, "model__gradient_checkpointing": "true"}),
    ("qwen2 tied", {"pp": 4}, {}),
    ("llama untied", {"pp": 2}, LORA),
    ("llama tied", {"pp": 2, "dp_shard": 2}, {}),
    ("qwen2 untied", {"pp": 2, "dp_shard": 2}, BUBBLE),
    ("llama tied", {"pp": 2, "dp_shard": 2}, {**EACH, "mesh__pp_schedule": "Interleaved1F1B"}),
    ("qwen2 untied", {"pp": 2, "dp_shard": 2}, {**EACH, "model__gradient_checkpointing": "true"}),
    ("llama tied", {"pp": 2, "dp_shard": 2}, {**EACH, **LORA, "mesh__pp_schedule": "GPipe"}),
    ("llama tied", {"pp": 2, "tp": 2}, V),
    ("qwen2 tied", {"pp": 2, "tp": 2}, LORA),
    ("llama tied", {"pp": 2, "cp": 2}, PACKED),
    ("qwen2 untied", {"pp": 2, "cp": 2}, RING),
]
"""In the longer suite."""


@pytest.mark.parametrize(
    ("model", "mesh", "options"),
    [
        *TELLING,
        *(pytest.param(*case, marks=pytest.mark.ranks) for case in CASES),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE),
    ],
    ids=str,
)
def test_a_mesh_trains_what_one_process_trains(
    model: str, mesh: dict[str, int], options: dict[str, Any], tmp_path: Path
) -> None:
    family, tied = model.split()
    ranks = math.prod(mesh.values())
    assert_equal_training(tmp_path, options_of(tmp_path, family, tied == "tied", **options), mesh, ranks)


@pytest.mark.ranks
@pytest.mark.parametrize("rule", [rule for rule in SABOTAGE if rule != "_without_inductor"])
def test_a_broken_rule_is_seen(rule: str, tmp_path: Path) -> None:
    mesh = {"_loss_of_each_rank": {"dp_shard": 2}, "_ties_apart": {"pp": 2}}.get(rule, {"tp": 2})
    options = options_of(tmp_path, "llama", True, train__check_replicas_every="null")  # which would see it first
    with pytest.raises(AssertionError, match="differs by"):
        assert_equal_training(tmp_path, options, mesh, 2, rule)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "more"),
    [
        ({"dp_shard": 2}, {}),
        ({"cp": 2}, {}),
        ({"tp": 2}, {}),
        ({"tp": 2}, {**NO_SEQUENCE, **LORA}),
        ({"tp": 2, "dp_shard": 2}, {"model__gradient_checkpointing": "selective"}),
    ],
    ids=str,
)
def test_compiled_layers_train_the_same(mesh: dict[str, int], more: dict[str, Any], tmp_path: Path) -> None:
    options = options_of(tmp_path, "llama", True, data__packing="true", data__max_length=96, **more)
    record(words_of({**options, "output_dir": tmp_path / "one"}), tmp_path / "one-tensors")
    options["model.compile"] = "true"
    assert_equal_training(tmp_path, options, mesh, math.prod(mesh.values()), "_without_inductor")


def _cut(words: list[str]) -> list[set[bool]]:
    """Whether those that are frozen, and those that are trained, are FSDP's."""
    config, device = load_config(TrainConfig, None, words), torch.device("cpu")
    model = build_parts(config, None, device, build_mesh(config, device))[0]
    return [
        {isinstance(p, DTensor) for p in model.parameters() if p.requires_grad is trained} for trained in (False, True)
    ]


def test_fsdp_copies_nothing_that_is_frozen_where_copies_are_whole(tmp_path: Path) -> None:
    options = options_of(tmp_path, "llama", True, output_dir=tmp_path / "run", **LORA)
    for mesh, frozen in (({"mesh.dp_replicate": 2}, {False}), ({"mesh.dp_shard": 2}, {True})):
        assert run_ranks(2, _cut, words_of(options | mesh)) == [[frozen, {True}]] * 2


MESHES: list[dict[str, int]] = [{"pp": 2}, {"tp": 2}, {"tp": 2, "dp_shard": 2}, {"dp_replicate": 2, "dp_shard": 2}]


@pytest.mark.ranks
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_what_was_loaded_is_exported_bit_for_bit(mesh: dict[str, int], tmp_path: Path) -> None:
    options = options_of(tmp_path, "qwen2", False, output_dir=tmp_path / "run")
    on_mesh = {f"mesh.{axis}": size for axis, size in mesh.items()}
    run_ranks(math.prod(mesh.values()), export_untrained, words_of({**options, **on_mesh}))
    before, after = weights(options["model.path"]), weights(tmp_path / "run/hf")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
