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
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RankError(RuntimeError):
    """A rank raised (its traceback is the note), died or was not done in time."""


def run_ranks(count: int, function: Callable[..., None], *args: Any, timeout: float) -> None:
    """Call ``function(*args)`` on ``count`` ranks with a gloo group over all of them, and wait for all.

    Args:
        count: of the ranks.
        function: a module's own: it is pickled by name.
        *args: pickled.
        timeout: seconds until all must be done.

    Raises:
        RankError: one was not; no rank is running any more then.
    """
    server, deadline = multiprocessing.get_context("forkserver"), time.monotonic() + timeout
    server.set_forkserver_preload([function.__module__])
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
            _wait({receiver: rank for rank, (receiver, _) in enumerate(pipes)}, deadline, timeout)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _wait(ranks: dict[Connection, int], deadline: float, timeout: float) -> None:
    """Until every rank has said that it is done."""
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
                failure = receiver.recv()
            except EOFError:
                raise RankError(f"rank {rank} died without a word (killed, or out of memory)") from None
            if failure is not None:
                error = RankError(f"rank {rank}: {failure[0]}")
                error.add_note(f"On rank {rank}:\n{failure[1]}")
                raise error


def _rank(
    rank: int, count: int, folder: Path, sender: Connection, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    # torch's hints about speed, from every rank
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    failure = None
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
        function(*args)
    except BaseException as error:
        failure = (f"{type(error).__name__}: {error}", traceback.format_exc())
    sender.send(failure)


def _end_with_parent() -> None:
    """A rank inside a collective would wait for others that are gone with the parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
