"""`automodel slurm`: the batch file is valid, starts the real training on several machines, and requeues what helps."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_automodel.cli import main
from nemo_automodel.recipes.exits import ExitCode
from tests.recipes.conftest import checkpoint, overrides, rows  # noqa: F401  (fixtures)

Overrides = Callable[..., list[str]]
ASKED = ["--nodes", "2", "--gpus-per-node", "1"]

# every machine is this one; srun's own options end where the program begins
SRUN = """#!/bin/bash
[ -z "${FAKE_CODE:-}" ] || exit "$FAKE_CODE"
while [[ $1 == --* ]]; do shift; done
for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & jobs+=($!); done
most=0
for job in "${jobs[@]}"; do wait "$job"; code=$?; [ $code -le $most ] || most=$code; done
exit $most
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'localhost\\nlocalhost\\n'; else echo "$@" >> scontrol.log; fi
"""


@pytest.fixture
def run_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    monkeypatch.chdir(tmp_path)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(text)
        stub.chmod(0o755)

    def run(script: Path, **more: str) -> subprocess.CompletedProcess[str]:
        job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
        path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        return subprocess.run(
            ["bash", str(script)],
            env={**os.environ, **path, **job, **more},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.mark.ranks
def test_the_batch_file_trains_on_two_machines(
    overrides: Overrides,  # noqa: F811
    tmp_path: Path,
    run_batch: Callable[..., subprocess.CompletedProcess[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--time", "1-00:00:00", "--partition", "gpu", "--cpus-per-task", "2", "--sbatch=--exclusive"]
    words = overrides("my run", train__device="cpu", train__max_steps=3)
    assert main(["slurm", *words, *ASKED, *options, "--signal-before", "120"]) == 0
    assert "sbatch my-run.sbatch" in capsys.readouterr().out
    script = tmp_path / "my-run.sbatch"
    text = script.read_text()
    for line in (
        "--nodes=2",
        "--time=1-00:00:00",
        "--partition=gpu",
        "--signal=TERM@120",
        "--exclusive",
        "--no-requeue",
    ):
        assert f"#SBATCH {line}\n" in text
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    done = run_batch(script)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my run/hf/model.safetensors").is_file()
    assert sorted(path.name for path in (tmp_path / "my run/logs/0").iterdir()) == ["rank-0", "rank-1"]
    assert "nnodes" not in (tmp_path / "my run/config.yaml").read_text()


@pytest.mark.parametrize(
    ("code", "attempt", "again"),
    [(75, 0, True), (143, 0, True), (75, 20, False), (2, 0, False), (1, 0, False), (0, 0, False)],
)
def test_the_job_is_requeued_where_that_helps(
    overrides: Overrides,  # noqa: F811
    tmp_path: Path,
    run_batch: Callable[..., subprocess.CompletedProcess[str]],
    code: int,
    attempt: int,
    again: bool,
) -> None:
    assert main(["slurm", *overrides(), *ASKED, "--requeue", "--out", "jobs/a.sbatch"]) == 0
    done = run_batch(tmp_path / "jobs/a.sbatch", FAKE_CODE=str(code), SLURM_RESTART_COUNT=str(attempt))
    assert done.returncode == code
    assert (tmp_path / "scontrol.log").exists() == again


def test_bad_input_of_one_machine_is_not_retried_though_another_one_lost_it(
    overrides: Overrides,  # noqa: F811
    tmp_path: Path,
    run_batch: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    script, said = tmp_path / "a.sbatch", tmp_path / "run/logs/0/rank-1/error.json"
    assert main(["slurm", *overrides(), *ASKED, "--requeue", "--out", str(script)]) == 0
    said.parent.mkdir(parents=True)
    said.write_text(json.dumps({"message": "no", "code": ExitCode.BAD_INPUT}))
    os.utime(script, (0, 0))  # a job's copy of its script is as old as the job
    assert run_batch(script, FAKE_CODE="75").returncode == ExitCode.BAD_INPUT
    os.utime(said, (0, 0))
    assert run_batch(script, FAKE_CODE="75").returncode == ExitCode.TEMPORARY


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--nodes 2", "required: --gpus-per-node"),
        ("--nodes two --gpus-per-node 8", "--nodes: invalid int value: 'two'"),
        ("--nodes 0 --gpus-per-node 8", "--nodes 0 must be at least 1"),
        ("--nodes 2 --gpus-per-node 8 --time 1d", "--time 1d: expected minutes, HH:MM:SS"),
        ("--nodes 2 --gpus-per-node 8 --signal-before 0", "Slurm takes 1 to 65535 seconds"),
        ("--nodes 2 --gpus-per-node 8 --partitoin x", "partitoin: unknown key"),
        ("--nodes 2 --gpus-per-node 8 --optim.lrr 1", "did you mean optim.lr?"),
    ],
)
def test_bad_options_are_one_message_and_no_file(
    overrides: Overrides,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["slurm", *overrides(), *options.split()]) == ExitCode.BAD_INPUT
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
