"""Run a function on several gloo ranks of this machine.

The ranks are forked from a server process that has imported torch and the library once: a test pays for its work, not
for imports, and a fork of the test process itself (which may have run a backward pass) never happens.
"""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
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
)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """``[function(*args) on rank 0, on rank 1, ...]``, each in a process with a gloo group over all of them.

    ``function`` is a module's own (it is pickled by name); results are pickled.

    Raises:
        AssertionError: a rank raised (the message is its traceback), died, or took longer than ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [SERVER.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            SERVER.Process(target=_rank, args=(rank, world_size, folder, sender, function, args), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            return _collect([receiver for receiver, _ in pipes], timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(receivers: Sequence[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = wait(waiting, timeout)
        assert ready, f"no rank answered within {timeout} s; done: {sorted(results)}"
        for receiver in ready:
            rank = list(receivers).index(receiver)
            try:
                failure, results[rank] = receiver.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert failure is None, f"rank {rank}:\n{failure}"
    return [results[rank] for rank in range(len(receivers))]


def _rank(
    rank: int, world_size: int, folder: str, sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        sender.send((None, function(*args)))
    except BaseException:
        sender.send((traceback.format_exc(), None))
    dist.destroy_process_group()
