"""Names the rank and the step that hang, and ends a training that makes no progress.

Every rank marks where it is; a thread of its own tells the others through the process group's store, and works also
while the main thread hangs in a collective.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch.distributed as dist

from nemo_automodel.recipes.exits import ExitCode, RankFailed, exit_code, is_lost_rank, record

if TYPE_CHECKING:
    from nemo_automodel.recipes.train import TrainConfig

_ORDER = ("setup", "data", "forward/backward", "optimizer", "validation", "checkpoint", "export")
"""Phases of a training as they follow each other within a step."""
_SLOW = ("setup", "export")
_PATIENCE = 4
"""Set-up (tokenizing, loading), the first step (compiling) and the export may take so many times ``hang_timeout``."""
_SECONDS_BETWEEN_REPORTS = 5.0

T = TypeVar("T")


class _Place(NamedTuple):
    """Where a rank is; places of one rank are compared by identity: every mark is another one."""

    step: int
    phase: str

    @property
    def order(self) -> tuple[int, int]:
        return self.step, _ORDER.index(self.phase)

    def __str__(self) -> str:
        return f"step {self.step} ({self.phase})" if self.step else self.phase


_place = _Place(0, "setup")
_first_step = 0


def mark(phase: str, step: int | None = None) -> None:
    """This rank begins ``phase``, of the step under way unless ``step`` is given; costs no more than the call."""
    global _place, _first_step
    _place = _Place(_place.step if step is None else step, phase)
    _first_step = _first_step or _place.step


def watched(train: Callable[..., T]) -> Callable[..., T]:
    """Let ``train(config, ...)`` run under a watchdog with ``config.train.hang_timeout``.

    What stops one rank is told to all: where a rank only hears that another is gone, it raises `RankFailed`.
    """

    @wraps(train)
    def run(config: "TrainConfig", *args: Any, **kwargs: Any) -> T:
        watchdog = Watchdog(config.train.hang_timeout)
        watchdog.start()
        try:
            return train(config, *args, **kwargs)
        except Exception as error:
            watchdog.tell(error)
            raise
        finally:
            watchdog.stop()

    return run


class Watchdog:
    """A thread that reports this rank's progress to the others, and ends the process when there is none.

    Args:
        timeout: seconds without progress; None: only a launcher that is gone ends the process.
        interval: seconds between two reports; default: a few, and a quarter of ``timeout`` at most.
    """

    def __init__(self, timeout: float | None, interval: float | None = None):
        self.timeout = timeout
        self._interval = interval or min(_SECONDS_BETWEEN_REPORTS, (timeout or 60.0) / 4)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._store: dist.Store | None = None
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def start(self) -> None:
        """Begin to watch; the training is setting up."""
        global _first_step
        mark("setup", 0)
        _first_step = 0
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join(1.0)  # a store that is gone may hold it longer
        faulthandler.cancel_dump_traceback_later()

    def tell(self, error: Exception) -> None:
        """Tell the other ranks that ``error`` ends this one.

        Raises:
            RankFailed: the error says only that another rank is gone, and that one has said why.
        """
        try:
            store = self._connected()
            if store is None:
                return
            if not is_lost_rank(error):
                _say_once(store, "failed", [dist.get_rank(), str(error), exit_code(error)])
                return
            until = time.monotonic() + 1.0  # the rank that failed may be a moment behind
            while not store.check(["failed"]) and time.monotonic() < until:
                time.sleep(0.1)
            if not store.check(["failed"]):
                return
            rank, message, code = json.loads(store.get("failed"))
        except dist.DistError:  # the store was with the rank that is gone
            return
        raise RankFailed(rank, message, code) from error

    def _watch(self) -> None:
        place, idle, before = _place, 0.0, time.monotonic()
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            # no more than two intervals at a time: a process that was stopped has not been hanging
            idle = idle + min(now - before, 2 * self._interval) if place is _place else 0.0
            place, before = _place, now
            if self._launcher is not None and os.getppid() != self._launcher:
                _end("the launcher is gone, and with it who would restart or stop this rank", stacks=False)
            try:
                self._look(place, idle)
            except dist.DistError as error:
                self._store = None
                if self._hangs(place, idle):
                    _end(f"no progress for {idle:.0f} s in {place}, and the other ranks cannot be asked: {error}")

    def _look(self, place: _Place, idle: float) -> None:
        """Report, and end this process if it hangs or another rank has found that all do."""
        if self.timeout is not None:  # a thread in C, which works too where this one cannot have the interpreter
            faulthandler.dump_traceback_later(self._patience(place) + 4 * self._interval, file=2)
        store = self._connected()
        if store is None:
            if self._hangs(place, idle):
                _end(f"no progress for {idle:.0f} s in {place}")
            return
        rank = dist.get_rank()
        store.set(f"rank {rank}", json.dumps([*place, time.time()]))
        if idle > 2 * self._interval and store.check(["failed"]):  # a collective on GPUs does not hear of it
            failed, message, code = json.loads(store.get("failed"))
            _end(f"rank {failed} failed: {message}", stacks=False, code=ExitCode(code))
        if self._hangs(place, idle):
            reports = [
                json.loads(store.get(f"rank {one}")) if store.check([f"rank {one}"]) else None
                for one in range(dist.get_world_size())
            ]
            _say_once(store, "hang", diagnose(idle, reports, 4 * self._interval))
        if store.check(["hang"]):
            message, behind = json.loads(store.get("hang"))
            _end(message, stacks=rank in behind)

    def _hangs(self, place: _Place, idle: float) -> bool:
        return self.timeout is not None and idle > self._patience(place)

    def _patience(self, place: _Place) -> float:
        """Seconds that ``place`` may take."""
        assert self.timeout is not None
        slow = place.phase in _SLOW or place.step == _first_step
        return self.timeout * (_PATIENCE if slow else 1)

    def _connected(self) -> dist.Store | None:
        """The group's store, through a connection of its own: the main thread may hang with the lock of the other."""
        if self._store is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("automodel/watchdog", store.clone())
        return self._store


def diagnose(idle: float, reports: Sequence[Any], silence: float) -> tuple[str, list[int]]:
    """What is known of ranks without progress.

    Args:
        idle: seconds without progress.
        reports: of every rank its step, its phase and when (seconds since the epoch) it reported; None for none.
        silence: seconds without a report after which a rank is taken for dead, or for one whose interpreter hangs.

    Returns:
        The message, and the ranks that the others wait for.
    """
    newest = max(report[2] for report in reports if report is not None)
    silent: list[int] = []
    places: dict[_Place, list[int]] = {}
    for rank, report in enumerate(reports):
        if report is None or newest - report[2] > silence:
            silent.append(rank)
        else:
            places.setdefault(_Place(*report[:2]), []).append(rank)
    groups = sorted(places.items(), key=lambda item: item[0].order)
    said = []
    if silent:
        last = [reports[rank] for rank in silent if reports[rank] is not None]
        where = f", and was last in {_Place(*last[0][:2])}" if len(last) == 1 else ""
        said.append(f"{_names(silent)} no longer {'reports' if len(silent) == 1 else 'report'}{where}")
    for place, ranks in groups:
        waits = bool(said)
        verb = ("waits", "wait") if waits else ("is still", "are still")
        said.append(f"{_names(ranks)} {verb[len(ranks) > 1]} in {place}")
    return f"no progress for {idle:.0f} s: {'; '.join(said)}", silent or groups[0][1]


def _names(ranks: Sequence[int]) -> str:
    """``rank 3``, or ``ranks 0-2, 4-7``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}"


def _say_once(store: dist.Store, key: str, value: Any) -> None:
    """Set ``key`` unless another rank was first."""
    store.compare_set(key, "", json.dumps(value))


def _end(message: str, stacks: bool = True, code: ExitCode = ExitCode.TEMPORARY) -> None:
    """End this process, whose main thread may never come back, saying why."""
    print(f"automodel: {message}", file=sys.__stderr__, flush=True)
    if stacks:
        faulthandler.dump_traceback(file=2)
    record(message, code)
    os._exit(code)
