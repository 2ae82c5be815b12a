"""Training on a mesh of each kind is training in one process."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.equality import assert_equal_training, options_of

LORA = {"lora__r": 4}
PACKED = {"data__packing": "true", "data__max_length": 96}
RING = {"mesh__cp_method": "ring"}
CASES: list[tuple[str, dict[str, int], dict[str, Any]]] = [
    ("llama tied", {"tp": 2}, {}),
    ("qwen2 untied", {"tp": 4}, {"mesh__sequence_parallel": "false"}),
    ("qwen2 tied", {"tp": 2}, {**LORA, "mesh__sequence_parallel": "false"}),
    ("llama untied", {"tp": 2, "dp_shard": 2}, {}),
    ("qwen2 untied", {"tp": 2}, {**LORA, "lora__dora": "true"}),
    ("llama tied", {"tp": 2, "dp_shard": 2}, {**LORA, **PACKED}),
    ("llama tied", {"cp": 4}, PACKED),
    ("llama untied", {"cp": 2, "tp": 2}, PACKED),
    ("qwen2 tied", {"cp": 2, "dp_shard": 2}, {**LORA, **PACKED, "model__attn_implementation": "eager"}),
    ("qwen2 untied", {"cp": 2}, RING),
]
LONGER: list[tuple[str, dict[str, int], dict[str, Any]]] = [
    ("qwen2 untied", {"cp": 2}, {"model__gradient_checkpointing": "true"}),
    ("llama tied", {"cp": 2}, {**PACKED, "model__gradient_checkpointing": "selective"}),
    ("qwen2 tied", {"cp": 2, "tp": 2}, {**LORA, "mesh__sequence_parallel": "false"}),
    ("llama tied", {"cp": 2, "tp": 2}, {**LORA, **PACKED, "lora__dora": "true"}),
    ("llama tied", {"cp": 4}, {**RING, "model__gradient_checkpointing": "selective"}),
    ("qwen2 tied", {"cp": 2, "tp": 2}, {**RING, **LORA}),
    ("llama tied", {"cp": 2, "dp_shard": 2}, RING),
]


@pytest.mark.parametrize(
    ("model", "mesh", "options"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONGER)],
    ids=lambda value: str(value),
)
def test_a_mesh_trains_what_one_process_trains(
    model: str, mesh: dict[str, int], options: dict[str, Any], tmp_path: Path
) -> None:
    family, tied = model.split()
    ranks = 1
    for size in mesh.values():
        ranks *= size
    assert_equal_training(tmp_path, options_of(tmp_path, family, tied == "tied", **options), mesh, ranks)
