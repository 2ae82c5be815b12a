"""What gloo ranks send in a training step is what `automodel plan` predicts, to the byte."""

from typing import Any

import pytest

from benchmarks.comm_bytes import CASES, SHAPE, compare

pytestmark = pytest.mark.ranks

QUICK = ("--mesh.dp_replicate 2 --mesh.dp_shard 2", "--mesh.tp 2 --mesh.dp_shard 2 --lora.r 4")


FAMILIES = [  # biases; a norm over each head, over all heads; norms after the MLP; a tied head and layers in parallel
    ("--mesh.tp 2 --mesh.sequence_parallel false", {"model_type": "starcoder2", "use_bias": True}),
    ("--mesh.tp 2 --mesh.dp_shard 2", {"model_type": "qwen3", "head_dim": 16}),
    ("--mesh.tp 2 --model.gradient_checkpointing true", {"model_type": "olmo2"}),
    ("--mesh.tp 2 --model.gradient_checkpointing true", {"model_type": "gemma2", "head_dim": 16}),
    ("--mesh.tp 2 --mesh.dp_shard 2", {"model_type": "cohere", "tie_word_embeddings": True}),
    (
        "--mesh.pp 2 --mesh.dp_shard 2 --mesh.pp_schedule Interleaved1F1B",
        {"model_type": "llama", "tie_word_embeddings": True},
    ),
    (
        "--mesh.pp 2 --mesh.dp_shard 2 --mesh.pp_reduce_each true",
        {"model_type": "llama", "tie_word_embeddings": True},
    ),
]


def assert_predicted(case: str, **changes: Any) -> None:
    if changes:
        changes["architectures"] = [f"{changes['model_type'].capitalize()}ForCausalLM"]
    for counted, predicted in compare(case, SHAPE | changes):
        assert counted.pop("numbers") < 100  # losses, counts and norms
        assert counted == predicted
        assert min(predicted.values()) > 10_000


@pytest.mark.parametrize("case", QUICK)
def test_bytes_sent_are_those_of_the_formula(case: str) -> None:
    assert_predicted(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(set(CASES) - set(QUICK)))
def test_bytes_sent_on_every_mesh(case: str) -> None:
    assert_predicted(case)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "changes"), FAMILIES, ids=lambda value: str(value))
def test_bytes_sent_by_other_families(case: str, changes: dict[str, Any]) -> None:
    assert_predicted(case, **changes)
