"""Tokens/s of Llama-3-8B LoRA and Llama-3.2-1B full under each backend, whole rows and packed documents, in one run.

    python benchmarks/backends.py --json backends.json         # on a GPU, with Transformer Engine and FlashAttention
    python benchmarks/backends.py --workload llama1b_packed    # one of them
    python benchmarks/backends.py --match "default|flash4"     # some of the backends

All rows are measured one after the other in one process. A backend that is not installed is a line that says so.
"""

import argparse
import gc
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from nemo_automodel.recipes.bench_variant import Request, measure
from nemo_automodel.recipes.workloads import WORKLOADS, Workload

OPTIMIZER = ("optim.masters=stochastic", "optim.moments=bfloat16")
"""Of all weights, as for the figures beside other libraries."""
TE = ("backend.attn=te", "backend.rms_norm=te", "backend.rope_fusion=true")
LINEAR = "backend.linear=te"
"""Which takes no adapters."""
WITHOUT_MASKS = [(f"backend.attn={name}",) for name in ("te", "flash2", "flash3", "flash4", "varlen")]
WHOLE = [(), *WITHOUT_MASKS]
PARTS = [("backend.rms_norm=te",), ("backend.rope_fusion=true",), ("backend.kernels=torch",)]
PACKED = [(), *WITHOUT_MASKS, ("backend.attn=sdpa",)]
ROWS = {
    "llama1b_full": [*WHOLE, (LINEAR,), (*TE, LINEAR), *PARTS],
    "llama8b_lora": [*WHOLE, TE, *PARTS],
    "llama1b_packed": PACKED,
    "llama8b_packed": PACKED,
}
FLEX = ("backend.attn=flex",)
"""Last: it is compiled, for each workload anew."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", action="append", choices=list(ROWS), help="default: all")
    parser.add_argument("--match", default="", help="only backends with this pattern in their words")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows, after each")
    options = parser.parse_args()
    names = options.workload or list(ROWS)
    plan = [(WORKLOADS[name], words) for name in names for words in ROWS[name]]
    plan += [(WORKLOADS[name], FLEX) for name in names]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    rows: list[dict[str, Any]] = []
    for workload, words in plan:
        row = {"workload": workload.name, "backend": " ".join(words) or "the default"}
        if not re.search(options.match, row["backend"]):
            continue
        row |= measured(workload, words, options.warmup, options.steps)
        rows.append(row)
        figures = row.get("error") or f"{row['tokens_per_second']:,.0f} tokens/s, {row['peak_gib']:.1f} GiB"
        print(f"{row['workload']:15} {row['backend']:80} {figures}", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measured(workload: Workload, words: tuple[str, ...], warmup: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="backends-") as folder:
        workload.write_config(Path(folder))
        try:
            result = measure(
                Request.of(
                    workload,
                    folder,
                    overrides=words if workload.lora else (*OPTIMIZER, *words),
                    steps=steps,
                    warmup=warmup,
                    profile=False,
                    parts=False,
                    device="cuda",
                )
            )
        except Exception as error:  # a row, whatever it is
            result = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    gc.collect()
    torch.cuda.empty_cache()
    return result


if __name__ == "__main__":
    main()
