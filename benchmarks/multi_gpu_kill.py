"""A training that loses a rank: when that is noticed, when it is past the same step again, and whether it ends alike.

python multi_gpu_kill.py RESULT.json < REQUEST.json
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemo_automodel.components.checkpoint import SafetensorsReader

STEPS, SAVE_EVERY, KILL_AT = 200, 20, 30  # the end is far off, should this process not get its turn
PATIENCE = 60
"""Seconds without a step, and without a second of work by the ranks: what starts on a busy machine takes its time."""


def start(request: dict[str, Any], folder: Path, *flags: str) -> subprocess.Popen[str]:
    shutil.rmtree(folder, ignore_errors=True)
    words = f"--output_dir {folder} --model.path {request['folder']} --data.train {request['folder']}/rows.jsonl "
    words += f"--train.device {request['device']} --train.max_steps {STEPS} --train.save_every {SAVE_EVERY} "
    words += f"{request['words']} --nproc-per-node {request['of']}"
    return launch(words.split(), folder, *flags)


def launch(words: Sequence[str], folder: Path, *flags: str) -> subprocess.Popen[str]:
    """A training in ``folder``; what the launcher says is in a file beside it, for a pipe that nobody reads fills."""
    command = [sys.executable, "-m", "nemo_automodel.cli", "train", *words, *flags]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with told(folder).open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, text=True)


def told(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def losses(folder: Path) -> list[float]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []  # what follows is being written
    return [json.loads(line)["loss"] for line in lines]


def wait_for_step(folder: Path, step: int, launcher: subprocess.Popen[str]) -> None:
    before, since = (0, 0), time.monotonic()
    while (at := len(losses(folder))) < step:
        if launcher.poll() is not None:
            done(launcher, folder)
            raise RuntimeError(f"{folder.name} ended at step {at}, before step {step}")
        if (now := (at, worked(launcher.pid))) != before:
            before, since = now, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            launcher.terminate()  # its ranks save and end, or are ended
            raise TimeoutError(f"{folder.name} stands still between steps {at} and {step}: {told(folder)}")
        time.sleep(0.02)


def worked(launcher: int) -> int:
    """Seconds of work by the launcher's ranks; by itself, while there are none."""
    ticks = 0
    for process in children(launcher) or [launcher]:
        with suppress(OSError):  # it has ended
            ticks += sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks // os.sysconf("SC_CLK_TCK")


def children(launcher: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
    except OSError:
        return []


def pid_of(rank: int, launcher: int) -> int:
    for child in children(launcher):
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return child
    raise LookupError(f"no worker of {launcher} is rank {rank}")


def done(launcher: subprocess.Popen[str], folder: Path) -> None:
    launcher.wait(timeout=10 * PATIENCE)
    if launcher.returncode:
        raise RuntimeError(f"the launcher ended with {launcher.returncode}: {told(folder).read_text()[-500:]}")


def kill_rank(rank: int, folder: Path, launcher: subprocess.Popen[str]) -> dict[str, float]:
    """Kill it; seconds until the launcher says so, and until a step follows the last one, whose number is ``step``."""
    os.kill(pid_of(rank, launcher.pid), signal.SIGKILL)
    killed = time.monotonic()
    while f"rank {rank} was killed by SIGKILL" not in told(folder).read_text():
        if time.monotonic() - killed > PATIENCE:
            raise TimeoutError(f"{folder.name}: the launcher has not noticed that rank {rank} is gone: {told(folder)}")
        time.sleep(0.02)
    noticed, step = time.monotonic() - killed, len(losses(folder))
    wait_for_step(folder, step + 1, launcher)
    return {"noticed_s": noticed, "again_s": time.monotonic() - killed, "step": step}


def kill(request: dict[str, Any], rank: int, whole: Path) -> dict[str, Any]:
    folder = Path(request["scratch"], "run", f"killed-{rank}")
    launcher = start(request, folder, "--max-restarts", "1")
    wait_for_step(folder, KILL_AT, launcher)
    found = kill_rank(rank, folder, launcher)
    done(launcher, folder)
    return {**found, **compare(folder, whole)}


def compare(one: Path, other: Path) -> dict[str, Any]:
    """How far the losses of two trainings are apart, and whether these and the exports are the same bit for bit."""
    apart = max(abs(a - b) for a, b in zip(losses(one), losses(other), strict=True))
    readers = [SafetensorsReader(each / "hf") for each in (one, other)]
    same = all(bool((readers[0].read(name) == readers[1].read(name)).all()) for name in readers[1])
    return {"bitwise": same and apart == 0, "loss_apart": apart}


def main() -> None:
    request = json.loads(sys.stdin.read())
    whole, again = (Path(request["scratch"], "run", name) for name in ("whole", "again"))
    for folder in (whole, again):  # twice: kernels need not add in the same order each time
        done(start(request, folder), folder)
    result = {"usual": compare(again, whole)}
    result["kills"] = {str(rank): kill(request, rank, whole) for rank in request["killed"]}
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
