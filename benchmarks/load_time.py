"""Load time and peak memory of a 1B-parameter bf16 checkpoint, beside transformers.

    python benchmarks/load_time.py                     # Llama-3.2-1B's shapes, random values
    python benchmarks/load_time.py --dtype float32     # cast while loading
    python benchmarks/load_time.py --layers 4 --runs 3 # smaller and quicker
    python benchmarks/load_time.py --folder DIR        # a checkpoint of your own
    python benchmarks/load_time.py --device cuda       # onto a GPU

Every load runs in a fresh process, and the two libraries take turns; the page cache is warm, or empty with ``--cold``.
On a CPU transformers leaves a parameter whose dtype does not change mapped to the file, and the kernel fetches it when
it is used; so three times are taken of each load, counted from the call:

* returned: ``from_pretrained`` is back;
* read: every page of every parameter has been read as well, as the first forward pass does;
* updated: every parameter has been changed in place as well, as the first optimizer step does.

Peak is the growth of the process's high-water mark, mapped pages that are resident included, over its memory just
before the call.
"""

import argparse
import json
import math
import mmap
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

MB = 1e6
LIBRARIES = ("nemo_automodel", "transformers")
TIMES = ("returned", "read", "updated")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="load this checkpoint instead of a made-up one")
    parser.add_argument("--dtype", default="bfloat16", help="of the loaded parameters (default bfloat16)")
    parser.add_argument("--device", default="cpu", help="where the parameters go (default cpu)")
    parser.add_argument("--layers", type=int, default=16, help="decoder layers of the made-up one (default 16)")
    parser.add_argument("--shard-size", default="1GB", help="largest shard of the made-up one (default 1GB)")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each load")
    parser.add_argument("--runs", type=int, default=7, help="loads per library (default 7)")
    parser.add_argument("--load", choices=LIBRARIES, help=argparse.SUPPRESS)  # what a fresh process does
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(args.load, args.folder, args.dtype, args.device)))
    elif args.folder:
        compare(args.folder, args.dtype, args.device, args.runs, args.cold)
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(Path(folder), args.layers, args.shard_size)
            compare(Path(folder), args.dtype, args.device, args.runs, args.cold)


def make_checkpoint(folder: Path, layers: int, shard_size: str, **changes: Any) -> None:
    """Llama-3.2-1B's shapes but for ``changes``, with random values, written by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shapes = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64}
    shapes |= {"num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, **changes}
    config = LlamaConfig(**shapes, tie_word_embeddings=True, dtype="bfloat16")
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard_size)


def load(library: str, folder: Path, dtype: str, device: str) -> dict[str, float]:
    """Load once: seconds since the call at each of `TIMES`, bytes of the peak and of the weights."""
    import torch

    if library == "transformers":
        from transformers import AutoModelForCausalLM as Auto
        from transformers.models.llama import modeling_llama  # noqa: F401  # imports are not part of loading
    else:
        from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM as Auto
        from nemo_automodel.components.models.llama import model as _  # noqa: F401
    where: dict[str, str] = {}
    if device != "cpu":
        where = {"device" if library == "nemo_automodel" else "device_map": device}
        torch.empty(1, device=device)  # nor is the start of the device
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark so far
    before = resident("VmRSS")
    times = []
    start = time.perf_counter()
    model = Auto.from_pretrained(folder, dtype=dtype, **where)
    finish(device)
    times.append(time.perf_counter() - start)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.flatten()[:: mmap.PAGESIZE // parameter.itemsize].sum()
        finish(device)
        times.append(time.perf_counter() - start)
        for parameter in model.parameters():
            parameter.mul_(0.5)
        finish(device)
        times.append(time.perf_counter() - start)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {**dict(zip(TIMES, times, strict=True)), "peak": resident("VmHWM") - before, "weights": weights}


def finish(device: str) -> None:
    """Wait for what was queued on the device."""
    import torch

    if device != "cpu":
        torch.accelerator.synchronize()


def resident(field: str) -> int:
    """Bytes that the kernel counts under ``field`` for this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024


def drop_from_page_cache(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # pages not yet written would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def compare(folder: Path, dtype: str, device: str, runs: int, cold: bool) -> None:
    """Alternate the libraries in fresh processes and print a table."""
    from nemo_automodel.components.checkpoint import SafetensorsReader

    results: dict[str, list[dict[str, float]]] = {library: [] for library in LIBRARIES}
    for run in range(runs + 1):
        for library in LIBRARIES:
            if cold:
                drop_from_page_cache(folder)
            command = [sys.executable, __file__, "--load", library, "--folder", str(folder)]
            command += ["--dtype", dtype, "--device", device]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            if run:  # the first round fills the page cache
                results[library].append(json.loads(output.splitlines()[-1]))
    ours, theirs = (results[library] for library in LIBRARIES)
    weights = ours[0]["weights"]
    reader = SafetensorsReader(folder)
    largest = (
        max(math.prod(reader.shape(key)) for key in reader)
        * weights
        / sum(math.prod(reader.shape(key)) for key in reader)
    )
    print(f"{dtype} on {device}: weights {weights / MB:.0f} MB, largest tensor {largest / MB:.0f} MB, {runs} runs each")
    print("seconds since the call, median (least):")
    print(f"{'':16}" + "".join(f"{name:>16}" for name in (*TIMES, "peak MB", "peak/weights")))
    for library, rows in results.items():
        cells = [f"{median(row[name] for row in rows):.2f} ({min(row[name] for row in rows):.2f})" for name in TIMES]
        peak = max(row["peak"] for row in rows)
        cells += [f"{peak / MB:.0f}", f"{peak / weights:.2f}"]
        print(f"{library:16}" + "".join(f"{cell:>16}" for cell in cells))
    ratios = [median(row[name] for row in ours) / median(row[name] for row in theirs) for name in TIMES]
    print(f"{'ratio':16}" + "".join(f"{ratio:>16.2f}" for ratio in ratios))
    within = max(row["peak"] for row in ours) <= weights + largest
    print(f"peak at most the weights and the largest tensor: {'yes' if within else 'NO'}")


if __name__ == "__main__":
    main()
