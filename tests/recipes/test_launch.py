"""`automodel train --nproc-per-node`: flags, logs by rank, exit codes, and restarts that lose nothing."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from benchmarks.multi_gpu_kill import done, kill_rank, launch, losses, pid_of, told, wait_for_step
from nemo_automodel.cli import main
from nemo_automodel.components.checkpoint import TrainingCheckpoints
from nemo_automodel.recipes.exits import ExitCode
from nemo_automodel.recipes.launch import LaunchOptions, _Logs, _recorded, code_of, first_failure, split_flags
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
    ("text", "said"), [(None, None), ("", None), ('{"message": "no', None), ('{"message": "no memory"}', "no memory")]
)
def test_words_of_a_rank_that_was_killed_while_it_wrote_them(
    text: str | None, said: str | None, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "error.json").write_text(text)
    assert _recorded(tmp_path / "error.json") == said


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


LONG: dict[str, Any] = {"train__device": "cpu", "train__max_steps": 200, "train__save_every": 50}
ENDLESS: dict[str, Any] = {"train__device": "cpu", "train__max_steps": 5000, "train__save_every": 5000}
RANKS = ["--nproc-per-node", "2"]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for ranks in /proc")
DROPOUT = {"lora__r": 4, "lora__dropout": 0.3}
MESHES: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "pp": {"mesh__pp": 2, **DROPOUT},
    "tp": {"mesh__tp": 2, **DROPOUT},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Overrides], Path]:
    """Folder of a training that nothing happened to, on a mesh of `MESHES`."""
    folders: dict[str, Path] = {}

    def train(mesh: str, words_of: Overrides) -> Path:
        if mesh not in folders:
            folders[mesh] = tmp_path_factory.mktemp(mesh) / "whole"
            words = words_of(str(folders[mesh]), **LONG, **MESHES[mesh])
            done(launch([*words, *RANKS], folders[mesh]), folders[mesh])
        return folders[mesh]

    return train


def _assert_ended_alike(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    files = [file.relative_to(other) for folder in ("hf", "adapter") for file in other.glob(f"{folder}/*.safetensors")]
    assert files
    assert all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_saves_and_ends_all(
    overrides: Overrides,  # noqa: F811
    tmp_path: Path,
    number: signal.Signals,
    code: int,
) -> None:
    run = tmp_path / "run"
    launcher = launch([*overrides(**ENDLESS), *RANKS], run, "--max-restarts", "2")
    wait_for_step(run, 25, launcher)
    launcher.send_signal(number)
    launcher.send_signal(number) if number == signal.SIGTERM else None  # schedulers do
    assert launcher.wait(timeout=300) == code, told(run).read_text()
    saved = TrainingCheckpoints(run / "checkpoints").latest()
    assert saved is not None
    assert f"stopped after step {saved.step}, which is saved" in told(run).read_text()
    assert saved.step % ENDLESS["train__save_every"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["pp", "tp"])
@LINUX
def test_the_same_command_goes_on_bit_for_bit_after_sigterm(
    overrides: Overrides,  # noqa: F811
    tmp_path: Path,
    uninterrupted: Callable[[str, Overrides], Path],
    mesh: str,
) -> None:
    run, words = tmp_path / "run", [*overrides(**LONG, **MESHES[mesh]), *RANKS]
    launcher = launch(words, run)
    wait_for_step(run, 60, launcher)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=300) == ExitCode.TERMINATED, told(run).read_text()
    done(launch(words, run), run)
    assert "resuming after step" in told(run).read_text()
    _assert_ended_alike(run, uninterrupted(mesh, overrides))


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "mesh"), [(0, "fsdp"), (1, "fsdp"), (1, "pp"), (0, "tp")])
@LINUX
def test_a_killed_rank_is_noticed_and_the_run_goes_on_bit_for_bit(
    overrides: Overrides,  # noqa: F811
    tmp_path: Path,
    uninterrupted: Callable[[str, Overrides], Path],
    rank: int,
    mesh: str,
) -> None:
    run = tmp_path / "run"
    launcher = launch([*overrides(**LONG, **MESHES[mesh]), *RANKS], run, "--max-restarts", "1")
    wait_for_step(run, 60, launcher)
    found = kill_rank(rank, run, launcher)
    assert "restart 1 of 1" in told(run).read_text()
    done(launcher, run)
    _assert_ended_alike(run, uninterrupted(mesh, overrides))
    print(found)


@pytest.mark.slow
@LINUX
def test_a_stopped_rank_is_named_and_the_code_says_try_again(overrides: Overrides, tmp_path: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    launcher = launch([*overrides(**ENDLESS, train__hang_timeout="3"), *RANKS], run)
    wait_for_step(run, 25, launcher)
    os.kill(pid_of(1, launcher.pid), signal.SIGSTOP)
    assert launcher.wait(timeout=300) == ExitCode.TEMPORARY
    err = told(run).read_text()
    assert "rank 1 no longer reports" in err
    assert "rank 0 waits in step" in err
