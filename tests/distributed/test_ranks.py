"""The harness itself: results come in rank order, and a failure is reported, not waited out."""

import pytest
import torch
import torch.distributed as dist

from nemo_automodel.verify.ranks import Method
from tests.distributed.ranks import run_ranks


def _sum_of_ranks(offset: int) -> tuple[int, int]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def _fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("a rank's own message")


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_results_come_in_rank_order(method: Method) -> None:
    assert run_ranks(3, _sum_of_ranks, 10, method=method) == [(0, 33), (1, 33), (2, 33)]


def test_a_failing_rank_is_reported_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"rank 1:(.|\n)*a rank's own message"):
        run_ranks(2, _fail_on_rank_1)
