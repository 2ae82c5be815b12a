"""Start the ranks of a training with torch's elastic agent: their logs, their exit codes, what is worth a restart."""

import argparse
import json
import logging
import os
import re
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.run import determine_local_world_size

from nemo_automodel.recipes.exits import ADVICE, ExitCode

_SECONDS_TO_DIE = 30
"""Between SIGTERM and SIGKILL for ranks whose training cannot go on; torchrun's own."""
_SECONDS_TO_SAVE = 24 * 3600
"""The same for ranks that were asked to stop: when it is too late is the scheduler's to say, with SIGKILL."""
_RESTARTABLE = (ExitCode.FAILED, ExitCode.TEMPORARY)


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """How many workers where; torchrun's flags and meanings.

    Raises:
        ValueError: values that no ranks could meet with.
    """

    nproc_per_node: str = "1"
    nnodes: int = 1
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int = 29500
    rdzv_endpoint: str | None = None
    rdzv_id: str | None = None
    rdzv_backend: str | None = None
    max_restarts: int = 0

    def __post_init__(self) -> None:
        if self.nnodes == 1:
            return
        if self.backend == "static" and self.max_restarts:
            raise ValueError(
                f"--max-restarts {self.max_restarts} with a static rendezvous, where machines meet once only: give "
                "--rdzv-endpoint HOST:PORT instead of --master-addr and --node-rank"
            )
        if (self.rdzv_endpoint is None) == (self.master_addr is None):
            raise ValueError(
                f"--nnodes {self.nnodes} needs one meeting point, the same on every node: --rdzv-endpoint HOST:PORT, "
                "or --master-addr HOST with --node-rank"
            )
        if self.backend == "static" and not 0 <= (-1 if self.node_rank is None else self.node_rank) < self.nnodes:
            raise ValueError(
                f"--node-rank {self.node_rank}: with --nnodes {self.nnodes} and a static rendezvous every node has a "
                f"number of its own from 0 to {self.nnodes - 1}"
            )

    @property
    def backend(self) -> str:
        """Of the rendezvous: static where nodes are numbered, else c10d."""
        return self.rdzv_backend or ("static" if self.master_addr else "c10d")

    @property
    def workers(self) -> int:
        """Of this node.

        Raises:
            ValueError: no number of them, or gpu without one.
        """
        try:
            count = determine_local_world_size(self.nproc_per_node)
        except ValueError as error:
            raise ValueError(f"--nproc-per-node {self.nproc_per_node}: {error}; give a number, gpu or auto") from error
        if count < 1:
            raise ValueError(f"--nproc-per-node {self.nproc_per_node} must be at least 1, gpu or auto")
        return count


_UNDERSCORES = re.compile(r"--(nproc_per_node|node_rank|master_(addr|port)|rdzv_(endpoint|id|backend)|max_restarts)\b")
"""torchrun takes its flags so as well."""


class FlagParser(argparse.ArgumentParser):
    """Says what is wrong by a ValueError, in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def _whole(least: int) -> Any:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text}")
        return int(text)

    return number


def _hyphens(match: re.Match[str]) -> str:
    return match[0].replace("_", "-")


def launch_parser() -> argparse.ArgumentParser:
    """Of the flags alone; for `--help`, and for what `split_flags` takes out of a command."""
    parser = FlagParser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group(
        "several ranks, with torchrun's flags (not part of the configuration; one of them starts torch's elastic agent)"
    )

    def add(flag: str, help: str, **options: Any) -> None:
        group.add_argument(flag, help=help, **options)

    add("--nproc-per-node", "workers on this machine: a number, gpu or auto (default: 1)", metavar="N")
    add("--nnodes", "machines (default: 1)", metavar="N", type=_whole(1))
    add("--rdzv-endpoint", "HOST[:PORT] where they meet, the same on all of them", metavar="HOST:PORT")
    add("--rdzv-id", "name of this job at a meeting point that several jobs share", metavar="NAME")
    add("--rdzv-backend", "default: static with --master-addr, else c10d", choices=("c10d", "static"))
    add("--node-rank", "of this machine, from 0; with --master-addr", metavar="N", type=_whole(0))
    add("--master-addr", "address of machine 0, instead of --rdzv-endpoint", metavar="HOST")
    add("--master-port", "on machine 0 (default: 29500)", metavar="PORT", type=_whole(1))
    add(
        "--max-restarts",
        "restart all workers, from the last checkpoint, so many times after one was lost (default: 0)",
        metavar="K",
        type=_whole(0),
    )
    return parser


def split_flags(words: Sequence[str]) -> tuple[LaunchOptions | None, list[str]]:
    """Launch flags taken out of a command's words: the options, None without any flag, and the words left.

    Raises:
        ValueError: a flag's value is of no use, or these words run in a rank already.
    """
    flags, rest = launch_parser().parse_known_args([_UNDERSCORES.sub(_hyphens, word) for word in words])
    if not vars(flags):
        return None, rest
    if "LOCAL_RANK" in os.environ:
        given = ", ".join("--" + name.replace("_", "-") for name in vars(flags))
        raise ValueError(
            f"{given}: this process is one of {os.environ.get('WORLD_SIZE', 'several')} ranks already (LOCAL_RANK is "
            "set); leave the flag out under torchrun or srun, or start one process per machine"
        )
    return LaunchOptions(**vars(flags)), rest


def launch(options: LaunchOptions, command: Sequence[str], logs: Path, device: torch.device) -> int:
    """Run ``automodel COMMAND`` in every worker of this machine, until all are done or one has failed for good.

    Args:
        options: how many workers where.
        command: words of a command line, without launch flags.
        logs: folder for the output of every rank; only the leading one's is shown here as well.
        device: that is trained on.

    Returns:
        The exit code of the rank that failed first, see `ExitCode`.

    Raises:
        ValueError: more workers than this machine has GPUs.
    """
    workers = options.workers
    if device.type == "cuda" and workers > torch.cuda.device_count():
        raise ValueError(
            f"--nproc-per-node {workers}, but this machine has {torch.cuda.device_count()} GPUs: one rank needs one"
        )
    # torch's agent gives all attempts one store, where ranks that restart find the addresses of those before
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # so many threads that the ranks together have every core; torchrun would leave all but one core idle
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
    agent = _Agent(_spec(options, workers, command), logs_specs=_Logs(logs), log_line_prefix_template="${role_name}")
    with _own_words(), _signals_restored():
        try:
            result = agent.run()
        except SignalException:
            return agent.workers_code(code_of(-agent.asked) if agent.asked else ExitCode.TEMPORARY)
        except RendezvousError as error:
            print(f"automodel: the other machines cannot be reached, or are gone: {error}", file=sys.stderr)
            return agent.workers_code(ExitCode.TEMPORARY)
        finally:
            if agent.asked is None:  # else the others may go on
                agent.get_worker_group().spec.rdzv_handler.shutdown()
    if not result.is_failed():
        return ExitCode.DONE
    rank, failure = first_failure(result.failures)
    code = code_of(failure.exitcode)
    print(f"automodel: {agent.describe(rank, failure)}\nexit code {code}: {ADVICE[code]}", file=sys.stderr)
    return code


def _spec(options: LaunchOptions, workers: int, command: Sequence[str]) -> WorkerSpec:
    endpoint, run_id = options.rdzv_endpoint or "localhost:0", options.rdzv_id or "none"
    settings: dict[str, Any] = {}
    address = port = None
    if options.nnodes == 1 and options.rdzv_endpoint is None:
        run_id = str(uuid.uuid4())
    elif options.backend == "static":
        address, port = options.master_addr, options.master_port
        endpoint = options.rdzv_endpoint or f"{address}:{port}"
        settings = {"rank": options.node_rank}
    meeting = RendezvousParameters(
        backend="c10d" if options.nnodes == 1 else options.backend,
        endpoint=endpoint,
        run_id=run_id,
        min_nodes=options.nnodes,
        max_nodes=options.nnodes,
        timeout=900,
        **settings,
    )
    # as for the console script, the folder that is worked in is no place to import from
    path = [] if os.getcwd() in map(os.path.abspath, sys.path) else ["-P"]
    return WorkerSpec(
        role="",  # in front of every line that is shown
        local_world_size=workers,
        entrypoint=sys.executable,
        args=("-u", *path, "-m", "nemo_automodel.cli", *command),
        rdzv_handler=get_rendezvous_handler(meeting),
        max_restarts=options.max_restarts,
        monitor_interval=0.1,
        master_addr=address,
        master_port=port,
    )


class _Agent(LocalElasticAgent):
    """torch's elastic agent, which restarts only what a restart may help, and waits while its workers save.

    Attributes:
        asked: the signal that this process was asked to stop with.
    """

    asked: signal.Signals | None = None
    _hurry = False

    def describe(self, rank: int, failure: ProcessFailure) -> str:
        """What became of a rank, in its own words where the console has not shown them yet, and where to read on."""
        assert self._pcontext is not None
        if failure.exitcode < 0:
            text = f"was killed by {failure.signal_name()}"
            text += " (the host may be out of memory)" if failure.exitcode == -signal.SIGKILL else ""
        else:
            text = f"ended with exit code {failure.exitcode}"
            said = _recorded(Path(failure.error_file))
            # the leading rank's words are on the console already, and all ranks may say the same
            files = map(Path, self._pcontext.error_files.values())
            shown = [_recorded(file) for file in files if file.parent.name == "rank-0"]
            text += f": {said}" if said and said not in shown else ""
        return f"rank {rank} {text}; its output: {Path(self._pcontext.stderrs[failure.local_rank]).parent}"

    def workers_code(self, without: ExitCode) -> ExitCode:
        """The exit code of workers that have been stopped: done only if all are; ``without`` any there is another."""
        if not isinstance(self._pcontext, SubprocessContext):
            return without
        codes = {code_of(handler.proc.returncode) for handler in self._pcontext.subprocess_handlers.values()}
        return next((code for code in _PRECEDENCE if code in codes), ExitCode.DONE)

    def _invoke_run(self, role: str = "") -> RunResult:
        try:
            return super()._invoke_run(role)
        except SignalException as error:
            self.asked = error.sigval
            raise

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            rank, failure = first_failure(result.failures)
            if code_of(failure.exitcode) not in _RESTARTABLE:
                self._remaining_restarts = 0
            elif self._remaining_restarts:
                total = worker_group.spec.max_restarts
                number = total - self._remaining_restarts + 1
                print(f"automodel: {self.describe(rank, failure)}; restart {number} of {total}", file=sys.stderr)
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = _SECONDS_TO_DIE) -> None:
        if self.asked is not None and self._pcontext is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers repeat it while the workers save
            # a worker whose terminal is gone (SIGHUP) should save as well
            death_sig = signal.SIGINT if self.asked == signal.SIGINT else signal.SIGTERM
            if self._hurry:  # a second Ctrl-C
                death_sig, timeout = signal.SIGINT, _SECONDS_TO_DIE
            else:
                self._hurry, timeout = True, _SECONDS_TO_SAVE
            self._pcontext.close(death_sig, timeout)
        super()._shutdown()  # its arguments differ between versions of torch


class _Logs(LogsSpecs):
    """``<folder>/<attempt>/rank-N/``: stdout.log, stderr.log, and error.json with a failed rank's own message.

    Attempts are counted over all sessions of a run, so that nothing is overwritten.
    """

    def __init__(self, folder: Path):
        super().__init__(str(folder))
        self._folder = folder

    @property
    def root_log_dir(self) -> str:
        return str(self._folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        ranks = {local: f"rank-{env['RANK']}" for local, env in envs.items()}
        attempt = 0
        while any((self._folder / str(attempt) / rank).exists() for rank in ranks.values()):
            attempt += 1
        files: dict[str, dict[int, str]] = {"stdout.log": {}, "stderr.log": {}, "error.json": {}}
        for local, rank in ranks.items():
            folder = self._folder / str(attempt) / rank
            folder.mkdir(parents=True)
            for name, paths in files.items():
                paths[local] = str(folder / name)
            envs[local]["TORCHELASTIC_ERROR_FILE"] = files["error.json"][local]
        out, err, error = files.values()
        leading = [local for local, env in envs.items() if env["RANK"] == "0"]
        return LogsDest(
            out,
            err,
            {local: out[local] for local in leading},
            {local: err[local] for local in leading},
            error,
            os.devnull,
            os.devnull,
        )


def _recorded(file: Path) -> str | None:
    """What a rank had to say, see `exits.record`; it may have been killed while it wrote."""
    try:
        return str(json.loads(file.read_text())["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


_PRECEDENCE = (
    ExitCode.BAD_INPUT,
    ExitCode.FAILED,
    ExitCode.TEMPORARY,
    ExitCode.INTERRUPTED,
    ExitCode.TERMINATED,
)
"""Which of several codes says more about the cause."""


def code_of(status: int) -> ExitCode:
    """The code that a worker's exit status (negative: the signal that killed it) stands for."""
    if status in (-signal.SIGTERM, -signal.SIGINT):
        return ExitCode(128 - status)
    if status < 0:
        return ExitCode.TEMPORARY
    return ExitCode(status) if status in list(ExitCode) else ExitCode.FAILED


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first, and how; of those that failed at once, one that says more than that others did.

    Args:
        failures: by rank, in the order in which they were noticed; later ones may be those that the agent ended.
    """
    first = next(iter(failures.values()))

    def weight(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, int, int]:
        rank, failure = item
        killed, code = failure.exitcode == -signal.SIGKILL, code_of(failure.exitcode)
        return failure.timestamp > first.timestamp + 1, not killed, _PRECEDENCE.index(code), rank

    return min(failures.items(), key=weight)


@contextmanager
def _own_words() -> Iterator[None]:
    """The console hears from the leading rank and, in few words, from here; LOGLEVEL brings torch's words back."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]
    before = {name: logging.getLogger(name).level for name in names}
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(line_buffering=True)  # a pipe sees a line when it is written
    if "LOGLEVEL" not in os.environ:
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _signals_restored() -> Iterator[None]:
    """The agent takes signals over and does not give them back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
