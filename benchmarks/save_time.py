"""Time and memory of saving: Hugging Face exports from several ranks, and the checkpoints of a running training.

    python benchmarks/save_time.py                       # all of it, on the CPU
    python benchmarks/save_time.py --device cuda         # training and its export only, 1B parameters on a GPU
    python benchmarks/save_time.py --layers 2 --runs 1   # smaller and quicker

Exports: about 4 GB of random bf16 weights, held in memory by CPU ranks with gloo, saved by ``save_pretrained`` in
shards of 1 GB. Seconds are the slowest rank's: until the call is back, and until the files are on the disk (this
library waits for that before it publishes them; transformers does not). Growth is that of a rank's high-water mark over
its memory, the model in it, just before the call: the largest of ranks and runs.

Training: the training loop's own `Run`, one process, all weights. Blocked is how long the loop stands still at a save;
in flight are the steps that begin while it is written in the background. A save adds to so many steps the time blocked
and what the steps in flight take longer, in sum, than the others. Then `automodel export` makes a Hugging Face folder
of the newest checkpoint, in a fresh process. Everything is written below the folder for temporary files (``TMPDIR``).
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

from load_ranks import prepare, run, update
from load_time import finish, make_checkpoint, resident

CASES = [("transformers", "", 1), ("ours", "", 1), ("ours", "fsdp", 2), ("ours", "tp", 2)]
CASES += [("ours", "fsdp", 4), ("ours", "tp", 4)]
SHARD_SIZE, ROWS, WARM_UP, STEPS = "1GB", 2, 2, 5
SMALL = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
# layers, tokens of a row, what differs from 1B's shapes
TRAINED = {"cpu": (4, 256, SMALL), "cuda": (16, 4096, {"max_position_embeddings": 4096})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="decoder layers (default: 32; trained 4, on a GPU 16)")
    parser.add_argument("--runs", type=int, default=2, help="saves of each kind (default 2)")
    parser.add_argument("--device", default="cpu", choices=TRAINED, help="where to train (default cpu)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)  # what a fresh process does
    args = parser.parse_args()
    if args.child:
        name, *values = args.child
        print(json.dumps({"save": save, "train": train, "export": export}[name](*values, args.runs)))
        return
    if args.device == "cpu":
        with tempfile.TemporaryDirectory() as folder:
            compare_exports(folder, args.layers or 32, args.runs)
    with tempfile.TemporaryDirectory() as folder:
        report_training(folder, args.device, args.layers, args.runs)


def child(runs: int, *values: str, ranks: int = 1, threads: int = 1) -> dict[str, Any]:
    return run([__file__, "--runs", str(runs), "--child", *values], ranks, threads)


def show(label: str, *cells: float | str) -> None:
    """A line of a table; whole numbers are bytes."""
    texts = {int: lambda size: f"{size / 1e6:.0f} MB", float: lambda number: f"{number:.2f}", str: str}
    print(f"{label:18}" + "".join(f"{texts[type(cell)](cell):>13}" for cell in cells), flush=True)


def compare_exports(folder: str, layers: int, runs: int) -> None:
    make_checkpoint(Path(folder, "model"), layers, SHARD_SIZE, vocab_size=32000)
    print(f"save_pretrained, {weights(Path(folder, 'model')) / 1e9:.2f} GB, {runs} saves each, median")
    show("", "returned s", "on disk s", "model", "growth")
    for library, mesh, ranks in CASES:
        try:
            row = child(runs, "save", library, mesh, folder, ranks=ranks)
            cells = row["returned"], row["on_disk"], row["model"], row["growth"]
        except subprocess.CalledProcessError as error:
            cells = (f"failed: exit status {error.returncode}",)
        show(f"{library} {mesh}".strip() + f" x{ranks}", *cells)


def save(library: str, mesh: str, folder: str, runs: int) -> dict[str, float]:
    """One rank: load, then save so many times."""
    import torch.distributed as dist

    auto, options = prepare(library, mesh)
    model = auto.from_pretrained(Path(folder, "model"), dtype="bfloat16", **options)
    held, rows, out = update(model), [], Path(folder, "saved")  # updated: in memory of its own, no longer mapped
    for _ in range(runs):
        if os.environ["RANK"] == "0":
            clear(out)
        if mesh:  # the first begins once all have loaded, a later one once all have flushed
            dist.barrier()
        start, before = time.perf_counter(), forget_peak()
        model.save_pretrained(out, max_shard_size=SHARD_SIZE)
        returned, growth = time.perf_counter() - start, resident("VmHWM") - before
        for file in out.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened)
        rows.append((returned, time.perf_counter() - start, growth))
        if mesh:
            dist.barrier()
    times, disk_times, growths = zip(*rows, strict=True)
    return {"returned": median(times), "on_disk": median(disk_times), "model": held, "growth": max(growths)}


def report_training(folder: str, device: str, layers: int | None, runs: int) -> None:
    usual, length, shapes = TRAINED[device]
    make_checkpoint(Path(folder, "model"), layers or usual, SHARD_SIZE, **shapes)
    write_data(Path(folder), length)
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    result = child(runs, "train", folder, device, threads=threads)
    alone = result["step"]
    print(f"training on {device}, {result['parameters'] / 1e6:.0f} M parameters, {ROWS} rows of {length} tokens")
    print(f"checkpoints of {result['bytes'] / 1e9:.2f} GB, {runs} saves of each kind, median")
    columns = "blocked s,complete s,growth,in flight,step s,longest s,blocked/step,adds to 100,to 1000"
    show("", *columns.split(","))
    show("no save", "", "", result["growth"], "", f"{alone:.3f}", f"{result['longest']:.3f}")
    for kind, rows in result["saves"].items():
        blocked, complete, growth, _ = zip(*rows, strict=True)
        steps = [seconds for row in rows for seconds in row[3]]
        cells = [median(blocked), median(complete), max(growth), len(steps) / runs]
        cells += [f"{median(steps):.3f}", f"{max(steps):.3f}"] if steps else ["", ""]
        added = (mean(blocked) + (sum(steps) - len(steps) * alone) / runs) / alone
        show(kind, *cells, median(blocked) / alone, f"{added / 100:.2%}", f"{added / 1000:.2%}")
    rows = [child(1, "export", folder, threads=threads) for _ in range(runs)]
    show("", "seconds", "written", "growth")
    cells = [median(row["seconds"] for row in rows), rows[0]["bytes"]]
    show("automodel export", *cells, max(row["growth"] for row in rows))


def write_data(folder: Path, length: int) -> None:
    """A tokenizer beside the model, and rows of so many tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0} | {f"w{i}": i + 1 for i in range(1000)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"text": " ".join(f"w{(7 * i + 13 * row) % 1000}" for i in range(length))} for row in range(8 * ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(folder: str, device: str, runs: int) -> dict[str, Any]:
    """Steps alone, then saves of both kinds in turns: seconds blocked and until complete, growth, steps in flight."""
    from nemo_automodel.components.data import DataConfig
    from nemo_automodel.recipes.train import LoopConfig, ModelConfig, Run, TrainConfig

    data = DataConfig(train=f"{folder}/rows.jsonl", max_length=TRAINED[device][1], overlong="truncate")
    loop = LoopConfig(max_steps=10**6, batch_size=ROWS, keep_last=1, device=device)
    model, output = ModelConfig(path=f"{folder}/model"), Path(folder, "run")
    training = Run(TrainConfig(output_dir=output, model=model, data=data, train=loop), say=lambda line: None)
    numbers = itertools.count(1)

    def step() -> float:
        start = time.perf_counter()
        training.step(next(numbers))
        finish(device)
        return time.perf_counter() - start

    for _ in range(WARM_UP):
        step()
    before = forget_peak()
    alone = [step() for _ in range(STEPS)]
    growth = resident("VmHWM") - before
    saves: dict[str, list[Any]] = {"asynchronous": [], "synchronous": []}
    for kind in list(saves) * runs:
        os.sync()
        alone.append(step())
        training.checkpoints.asynchronous = kind == "asynchronous"
        start, before, in_flight = time.perf_counter(), forget_peak(), []
        training.save(next(numbers))
        blocked = time.perf_counter() - start
        while (pending := training.checkpoints._pending) is not None and not pending.done():
            in_flight.append(step())
        saves[kind].append((blocked, time.perf_counter() - start, resident("VmHWM") - before, in_flight))
        training.checkpoints.wait()
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    sizes = {"parameters": parameters, "bytes": weights(output / "checkpoints"), "growth": growth}
    return {"step": median(alone), "longest": max(alone), "saves": saves, **sizes}


def export(folder: str, runs: int) -> dict[str, float]:
    from nemo_automodel.recipes.export import export_checkpoint

    clear(out := Path(folder, "exported"))
    start, before = time.perf_counter(), forget_peak()
    export_checkpoint(Path(folder, "run"), out)
    return {"seconds": time.perf_counter() - start, "growth": resident("VmHWM") - before, "bytes": weights(out)}


def forget_peak() -> int:
    """Begin a new high-water mark; returns the bytes of the process now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()  # what was written before is not to be waited for in what is timed


def weights(folder: Path) -> int:
    """Bytes of all the safetensors files below ``folder``."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


if __name__ == "__main__":
    main()
