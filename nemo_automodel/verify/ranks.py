"""Run a function on several gloo ranks of this machine, each a process of its own that cannot outlive this one.

The ranks are forked from a server process that has made the imports once and nothing else.
"""

import logging
import multiprocessing
import os
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

Method = Literal["forkserver", "spawn"]


class RankError(RuntimeError):
    """A rank raised (its traceback is the note), died or was not done in time."""


def run_ranks(
    count: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float,
    preload: Sequence[str] = (),
    method: Method = "forkserver",
) -> list[Any]:
    """``[function(*args) on rank 0, on rank 1, ...]``, each with a gloo group over all ``count`` of them.

    Args:
        count: of the ranks.
        function: a module's own: it is pickled by name.
        *args: pickled, as are the results.
        timeout: seconds until all must be done.
        preload: modules that the server imports, should it not have started yet; default: the function's.
        method: how ranks start; ``spawn`` where they use GPUs, which CUDA forbids to the forked ones of a server whose
            imports have asked it for one. They make the imports themselves then.

    Raises:
        RankError: one was not; no rank is running any more then.
    """
    server: Any = multiprocessing.get_context(method)
    deadline = time.monotonic() + timeout
    if method == "forkserver":
        server.set_forkserver_preload(list(preload) or [function.__module__])
    with tempfile.TemporaryDirectory(prefix="automodel-ranks-") as folder:
        pipes = [server.Pipe(duplex=False) for _ in range(count)]
        processes = [
            server.Process(target=_rank, args=(rank, count, Path(folder), sender, function, args), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]
        try:
            for process, (_, sender) in zip(processes, pipes, strict=True):
                process.start()
                sender.close()  # so that a rank that dies is heard of
            return _results({receiver: rank for rank, (receiver, _) in enumerate(pipes)}, deadline, timeout)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _results(ranks: dict[Connection, int], deadline: float, timeout: float) -> list[Any]:
    """Of every rank, in their order, once all have said that they are done."""
    results: dict[int, Any] = {}
    while ranks:
        ready = [
            each for each in wait(list(ranks), max(0.0, deadline - time.monotonic())) if isinstance(each, Connection)
        ]
        if not ready:
            raise RankError(
                f"ranks {sorted(ranks.values())} were not done within {timeout:.0f} s and were stopped: they wait for "
                "each other, in a collective that not all of them call, or are too slow"
            )
        for receiver in ready:
            rank = ranks.pop(receiver)
            try:
                failure, results[rank] = receiver.recv()
            except EOFError:
                raise RankError(f"rank {rank} died without a word (killed, or out of memory)") from None
            if failure is not None:
                error = RankError(f"rank {rank}: {failure[0]}")
                error.add_note(f"On rank {rank}:\n{failure[1]}")
                raise error
    return [results[rank] for rank in sorted(results)]


def _rank(
    rank: int, count: int, folder: Path, sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    # torch's hints about speed, from every rank
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
        sender.send((None, function(*args)))
    except BaseException as error:
        sender.send(((f"{type(error).__name__}: {error}", traceback.format_exc()), None))


def _end_with_parent() -> None:
    """A rank inside a collective would wait for others that are gone with the parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
