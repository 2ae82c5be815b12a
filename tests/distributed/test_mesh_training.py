"""Training on a mesh of each kind is training in one process."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.equality import assert_equal_training, options_of

LORA = {"lora__r": 4}
PACKED = {"data__packing": "true", "data__max_length": 96}
CASES: list[tuple[str, dict[str, int], dict[str, Any]]] = [
    ("llama tied", {"tp": 2}, {}),
    ("qwen2 untied", {"tp": 4}, {"mesh__sequence_parallel": "false"}),
    ("qwen2 tied", {"tp": 2}, {**LORA, "mesh__sequence_parallel": "false"}),
    ("llama untied", {"tp": 2, "dp_shard": 2}, {}),
    ("qwen2 untied", {"tp": 2}, {**LORA, "lora__dora": "true"}),
    ("llama tied", {"tp": 2, "dp_shard": 2}, {**LORA, **PACKED}),
    ("llama tied", {"cp": 4}, PACKED),
    ("qwen2 untied", {"cp": 2}, {}),
    ("llama untied", {"cp": 2, "tp": 2}, PACKED),
    ("qwen2 tied", {"cp": 2, "dp_shard": 2}, {**LORA, **PACKED, "model__attn_implementation": "eager"}),
    ("qwen2 tied", {"cp": 2, "tp": 2}, {**LORA, "mesh__sequence_parallel": "false"}),
]


@pytest.mark.parametrize(("model", "mesh", "options"), CASES, ids=lambda value: str(value))
def test_a_mesh_trains_what_one_process_trains(
    model: str, mesh: dict[str, int], options: dict[str, Any], tmp_path: Path
) -> None:
    family, tied = model.split()
    ranks = 1
    for size in mesh.values():
        ranks *= size
    assert_equal_training(tmp_path, options_of(tmp_path, family, tied == "tied", **options), mesh, ranks)
