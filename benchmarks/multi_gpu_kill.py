"""A training that loses a rank: when that is noticed, when it is past the same step again, and whether it ends alike.

python multi_gpu_kill.py REQUEST.json RESULT.json
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nemo_automodel.components.checkpoint import SafetensorsReader

STEPS, SAVE_EVERY, KILL_AT = 100, 20, 30
PATIENCE = 120


def start(request: dict[str, Any], folder: Path, *flags: str) -> subprocess.Popen[str]:
    shutil.rmtree(folder, ignore_errors=True)
    words = f"--output_dir {folder} --model.path {request['folder']} --data.train {request['folder']}/rows.jsonl "
    words += f"--train.device {request['device']} --train.max_steps {STEPS} --train.save_every {SAVE_EVERY} "
    words += f"{request['words']} --nproc-per-node {request['of']}"
    command = [sys.executable, "-m", "nemo_automodel.cli", "train", *words.split(), *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def losses(folder: Path) -> list[float]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []  # what follows is being written
    return [json.loads(line)["loss"] for line in lines]


def wait_for_step(folder: Path, step: int, launcher: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while (at := len(losses(folder))) < step:
        if launcher.poll():
            done(launcher)
        if time.monotonic() > deadline:
            launcher.terminate()  # its ranks save and end, or are ended
            raise TimeoutError(f"{folder.name} did not come from step {at} to step {step} in {PATIENCE} s")
        time.sleep(0.02)


def pid_of(rank: int, launcher: int) -> int:
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise LookupError(f"no worker of {launcher} is rank {rank}")


def done(launcher: subprocess.Popen[str]) -> None:
    _, said = launcher.communicate(timeout=PATIENCE)
    if launcher.returncode:
        raise RuntimeError(f"the launcher ended with {launcher.returncode}: {said[-500:]}")


def kill(request: dict[str, Any], rank: int, whole: Path) -> dict[str, Any]:
    folder = Path(request["scratch"], "run", f"killed-{rank}")
    launcher = start(request, folder, "--max-restarts", "1")
    wait_for_step(folder, KILL_AT, launcher)
    os.kill(pid_of(rank, launcher.pid), signal.SIGKILL)
    killed = time.monotonic()
    assert launcher.stderr is not None
    for line in launcher.stderr:
        if f"rank {rank} was killed by SIGKILL" in line:
            break
    noticed = time.monotonic() - killed
    step = len(losses(folder))
    wait_for_step(folder, step + 1, launcher)
    again = time.monotonic() - killed
    done(launcher)
    return {"noticed_s": noticed, "again_s": again, "step": step, **compare(folder, whole)}


def compare(one: Path, other: Path) -> dict[str, Any]:
    """How far the losses of two trainings are apart, and whether these and the exports are the same bit for bit."""
    apart = max(abs(a - b) for a, b in zip(losses(one), losses(other), strict=True))
    readers = [SafetensorsReader(each / "hf") for each in (one, other)]
    same = all(bool((readers[0].read(name) == readers[1].read(name)).all()) for name in readers[1])
    return {"bitwise": same and apart == 0, "loss_apart": apart}


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    whole, again = (Path(request["scratch"], "run", name) for name in ("whole", "again"))
    for folder in (whole, again):  # twice: kernels need not add in the same order each time
        done(start(request, folder))
    result = {"usual": compare(again, whole)}
    result["kills"] = {str(rank): kill(request, rank, whole) for rank in request["killed"]}
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
