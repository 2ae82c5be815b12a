"""Run a function on several gloo ranks of this machine, all of which have the library's imports made once."""

import multiprocessing
from collections.abc import Callable
from typing import Any

from nemo_automodel.verify import ranks
from nemo_automodel.verify.ranks import Method

SERVER = multiprocessing.get_context("forkserver")
PRELOAD = [
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "nemo_automodel.components.models.llama.model",
    "nemo_automodel.components.models.qwen2.model",
    "nemo_automodel.recipes.train",
    "tests.conftest",
]
SERVER.set_forkserver_preload(PRELOAD)


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120, method: Method = "forkserver"
) -> list[Any]:
    """``[function(*args) on rank 0, on rank 1, ...]``; see `ranks.run_ranks`.

    Raises:
        AssertionError: a rank raised (the message has its traceback), died, or took longer than ``timeout`` seconds.
    """
    try:
        return ranks.run_ranks(world_size, function, *args, timeout=timeout, preload=PRELOAD, method=method)
    except ranks.RankError as error:
        raise AssertionError("\n".join([str(error), *getattr(error, "__notes__", [])])) from error
