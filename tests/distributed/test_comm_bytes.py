"""What gloo ranks send in a training step is what `automodel plan` predicts, to the byte."""

import pytest

from benchmarks.comm_bytes import CASES, compare

QUICK = ("--mesh.dp_replicate 2 --mesh.dp_shard 2", "--mesh.tp 2 --mesh.dp_shard 2 --lora.r 4")


def assert_predicted(case: str) -> None:
    for counted, predicted in compare(case):
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
