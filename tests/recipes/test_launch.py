"""`automodel train --nproc-per-node`: flags, logs by rank, exit codes, and restarts that lose nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from nemo_automodel.cli import main
from nemo_automodel.components.checkpoint import TrainingCheckpoints
from nemo_automodel.recipes.exits import ExitCode
from nemo_automodel.recipes.launch import LaunchOptions, _Logs, code_of, first_failure, split_flags
from tests.recipes.conftest import checkpoint, overrides, rows  # noqa: F401  (fixtures)

Overrides = Callable[..., list[str]]


def test_flags_are_taken_out_and_the_rest_stays_as_it_was() -> None:
    words = ["a.yaml", "--optim.lr", "-1", "--nproc-per-node", "2", "--x=1", "--rdzv_endpoint=h:1", "--print-config"]
    options, rest = split_flags(words)
    assert rest == ["a.yaml", "--optim.lr", "-1", "--x=1", "--print-config"]
    assert options == LaunchOptions(nproc_per_node="2", rdzv_endpoint="h:1")
    assert split_flags(rest) == (None, rest)


def test_help_has_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    assert {"--nproc-per-node", "--rdzv-endpoint", "--max-restarts"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--nproc-per-node two", "--nproc-per-node two: "),
        ("--nproc-per-node 0", "--nproc-per-node 0 must be at least 1, gpu or auto"),
        ("--nproc-per-node", "--nproc-per-node: expected one argument"),
        ("--nnodes 2", "--nnodes 2 needs one meeting point"),
        ("--nnodes 1:4", "--nnodes: expected a whole number of at least 1, got 1:4"),
        ("--nnodes 2 --rdzv-endpoint a:1 --master-addr b", "--nnodes 2 needs one meeting point"),
        ("--nnodes 2 --master-addr b", "--node-rank None: with --nnodes 2 and a static rendezvous"),
        ("--nnodes 2 --master-addr b --node-rank 2", "a number of its own from 0 to 1"),
        ("--nnodes 2 --master-addr b --node-rank 1 --max-restarts 1", "give --rdzv-endpoint HOST:PORT instead"),
        ("--max-restarts -1", "--max-restarts: expected a whole number of at least 0, got -1"),
        ("--rdzv-backend etcd", "--rdzv-backend: invalid choice: 'etcd'"),
        ("--nproc-per-node 2 --optim.lrr 1", "did you mean optim.lr?"),
    ],
)
def test_bad_flags_and_configurations_are_one_message_before_anything_starts(
    overrides: Overrides,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: str,
    message: str,
) -> None:
    assert main(["train", *overrides(), *flags.split()]) == ExitCode.BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("automodel:") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_rank_does_not_launch_ranks(
    overrides: Overrides,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", *overrides(), "--nproc-per-node", "2"]) == ExitCode.BAD_INPUT
    assert "one of 4 ranks already" in capsys.readouterr().err


def test_logs_of_every_attempt_and_node_have_a_place_of_their_own(tmp_path: Path) -> None:
    nodes = [{0: {"RANK": "0"}, 1: {"RANK": "1"}}, {0: {"RANK": "2"}, 1: {"RANK": "3"}}]
    for attempt in ("0", "1"):
        places = [_Logs(tmp_path).reify(envs) for envs in nodes]
        assert places[1].stderrs[0] == str(tmp_path / attempt / "rank-2" / "stderr.log")
        assert places[0].tee_stdouts == {0: str(tmp_path / attempt / "rank-0" / "stdout.log")}
        assert places[1].tee_stdouts == places[1].tee_stderrs == {}


@pytest.mark.parametrize(
    ("status", "code"),
    [(0, 0), (1, 1), (2, 2), (3, 1), (75, 75), (-9, 75), (-11, 75), (-15, 143), (-2, 130), (143, 143)],
)
def test_what_a_workers_status_stands_for(status: int, code: int) -> None:
    assert code_of(status) == code


@pytest.mark.parametrize(
    ("noticed", "first"),
    [
        ([(0, 75, 0), (1, 2, 0)], 1),  # 0 only lost 1
        ([(0, 75, 1), (1, -9, 1)], 1),
        ([(3, 75, 0), (0, -9, 31)], 3),  # 0 was killed by the agent
        ([(2, 2, 0), (0, -15, 1), (1, 143, 1)], 2),
        ([(1, 2, 0), (0, 2, 0)], 0),
        ([(1, 2, 0), (0, 1, 9)], 1),
    ],
)
def test_the_rank_that_failed_first(noticed: list[tuple[int, int, int]], first: int) -> None:
    failures = {}
    for rank, status, after in noticed:
        failures[rank] = ProcessFailure(rank, 1, status, "")
        failures[rank].timestamp = 1000 + after
    assert first_failure(failures)[0] == first


@pytest.mark.ranks
def test_bad_input_is_said_once_and_not_restarted(
    overrides: Overrides,  # noqa: F811
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    words = overrides(train__device="cpu", data__train=tmp_path / "missing.jsonl")
    assert main(["train", *words, "--nproc-per-node", "2", "--max-restarts", "3"]) == ExitCode.BAD_INPUT
    error = capfd.readouterr().err
    assert error.count("missing.jsonl") == 1, error
    assert "exit code 2: the input cannot be used" in error
    assert "torch" not in error
    assert [path.name for path in (tmp_path / "run/logs").iterdir()] == ["0"]
    for rank in (0, 1):
        assert "missing.jsonl" in (tmp_path / f"run/logs/0/rank-{rank}/stderr.log").read_text()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def _start(words: list[str], *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nemo_automodel.cli", "train", *words, "--nproc-per-node", "2", *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _wait_for_step(run: Path, step: int) -> None:
    for _ in range(15_000):
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run} did not come to step {step} in five minutes")


def _pid_of_rank(rank: int, launcher: int) -> int:
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"no worker of {launcher} is rank {rank}")


LONG: dict[str, Any] = {"train__device": "cpu", "train__max_steps": 80, "train__save_every": 20}
ENDLESS: dict[str, Any] = {"train__device": "cpu", "train__max_steps": 5000, "train__save_every": 5000}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_saves_and_ends_all(
    overrides: Overrides,  # noqa: F811
    tmp_path: Path,
    number: signal.Signals,
    code: int,
) -> None:
    launcher = _start(overrides(**ENDLESS), "--max-restarts", "2")
    _wait_for_step(tmp_path / "run", 25)
    launcher.send_signal(number)
    launcher.send_signal(number) if number == signal.SIGTERM else None  # schedulers do
    out, err = launcher.communicate(timeout=300)
    assert launcher.returncode == code, err
    saved = TrainingCheckpoints(tmp_path / "run/checkpoints").latest()
    assert saved is not None
    assert f"stopped after step {saved.step}, which is saved" in out


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for ranks in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_noticed_and_the_run_goes_on_bit_for_bit(
    overrides: Overrides,  # noqa: F811
    tmp_path: Path,
    rank: int,
) -> None:
    whole = _start(overrides("whole", **LONG))
    launcher = _start(overrides(**LONG), "--max-restarts", "1")
    _wait_for_step(tmp_path / "run", 30)
    os.kill(_pid_of_rank(rank, launcher.pid), signal.SIGKILL)
    killed = time.monotonic()
    assert launcher.stderr is not None
    said = launcher.stderr.readline()
    noticed = time.monotonic() - killed
    assert f"rank {rank} was killed by SIGKILL" in said
    assert "restart 1 of 1" in said
    done = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
    _wait_for_step(tmp_path / "run", done + 1)
    again = time.monotonic() - killed
    for process in (launcher, whole):
        process.communicate(timeout=300)
        assert process.returncode == 0
    files = [tmp_path / run / "hf/model.safetensors" for run in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("run", "whole")
    ]
    assert losses[0] == losses[1]
    print(f"noticed after {noticed:.1f} s, past step {done} again after {again:.1f} s")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for ranks in /proc")
def test_a_stopped_rank_is_named_and_the_code_says_try_again(overrides: Overrides, tmp_path: Path) -> None:  # noqa: F811
    launcher = _start(overrides(**ENDLESS, train__hang_timeout="3"))
    _wait_for_step(tmp_path / "run", 25)
    os.kill(_pid_of_rank(1, launcher.pid), signal.SIGSTOP)
    _, err = launcher.communicate(timeout=300)
    assert launcher.returncode == ExitCode.TEMPORARY
    assert "rank 1 no longer reports" in err
    assert "rank 0 waits in step" in err
