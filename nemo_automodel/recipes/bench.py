"""`automodel bench`: how fast a training step is on this machine, beside transformers with and without help.

Every variant runs in a process of its own, one after the other, so that none changes or crowds the next. Beside a GPU
the next process already imports, which takes longer than most rows are measured.
"""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from nemo_automodel.recipes.bench_variant import BATCHES, OURS, PEERS, Request, our_config
from nemo_automodel.recipes.building import auto_dtype, pick_device
from nemo_automodel.recipes.flops import FORMULA, Arithmetic, arithmetic
from nemo_automodel.recipes.served import in_one_line
from nemo_automodel.recipes.step_parts import PARTS
from nemo_automodel.recipes.workloads import Workload, mean_length


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """How to measure.

    Attributes:
        variants: overrides of ours, a row each, as ``("backend.attn=flex",)``; ``((),)`` is the defaults alone.
        peers: names in `PEERS`.
        steps: that are measured.
        warmup: steps before them.
        profile: make a table of kernels.
        device: ``auto``, ``cpu``, ``cuda``, ...
        json: where to write everything, after every row anew.

    Raises:
        ValueError: numbers that cannot be, an unknown peer, a variant that is no ``key=value``.
    """

    variants: Sequence[Sequence[str]] = ((),)
    peers: Sequence[str] = ()
    steps: int = 5
    warmup: int = 4
    profile: bool = False
    device: str = "auto"
    json: Path | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 1:
            raise ValueError(f"--steps {self.steps} and --warmup {self.warmup} must be at least 1")
        if unknown := [peer for peer in self.peers if peer not in PEERS]:
            raise ValueError(f"--peers {unknown[0]!r}: there are {', '.join(PEERS)}")
        for word in (word for words in self.variants for word in words):
            if "=" not in word:
                raise ValueError(f"--variant {word!r} is no key=value, as backend.attn=sdpa (the workload comes first)")


def bench(workload: Workload, options: BenchOptions, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure ``workload`` in every variant.

    Args:
        workload: what to train.
        options: which variants, and how.
        say: called with each line meant for the user while rows come.

    Returns:
        What ``--json`` holds. A variant that failed is a row with its ``error``.

    Raises:
        ValueError: an override that cannot be, a device that is not there, a config that builds no model.
    """
    device = _device(workload, options.device, say)
    with tempfile.TemporaryDirectory(prefix="automodel-bench-") as name:
        folder = Path(name)
        workload.write_config(folder)
        common = Request.of(
            workload,
            str(folder),
            steps=options.steps,
            warmup=options.warmup,
            profile=options.profile,
            device=str(device),
        )
        requests = [replace(common, overrides=tuple(words)) for words in options.variants]
        if workload.documents and options.peers:
            raise ValueError(f"--peers: rows of {workload.name} hold several documents, which only ours trains on")
        seen = mean_length(workload.rows, workload.length, BATCHES) if workload.documents else workload.length
        cost = arithmetic(str(folder), seen)
        full = [our_config(request).lora is None for request in requests]
        requests += [replace(common, variant=peer) for peer in options.peers]
        full += [workload.lora is None] * len(options.peers)
        report = _header(workload, cost, device)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
        with _Processes(folder, len(requests), device) as processes:
            for request, all_weights in zip(requests, full, strict=True):
                row: dict[str, Any] = {
                    "name": _name(request),
                    "variant": request.variant,
                    "overrides": list(request.overrides),
                }
                row |= processes.measure(request)
                if "error" not in row:
                    row["tflops"] = row["tokens_per_second"] * cost.per_token(all_weights) / 1e12
                report["rows"].append(row)
                _compare(report)
                say(_line(row))
                if options.json is not None:
                    options.json.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    return report


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """The tables: speed and memory, parts of the step, kinds of kernel where they were asked for; what served ours."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a log has no edge
    rows = [row for row in report["rows"] if "error" not in row]
    if rows:
        console.print(_speed_table(report, rows))
        console.print(_by_kind("ms of a step, by part", list(PARTS), {row["name"]: row["parts_ms"] for row in rows}))
    if any("kernels" in row for row in rows):
        kinds = {kind: None for row in rows for kind in row["kernels"]["kinds"]}
        columns = {row["name"]: {k: v["ms"] for k, v in row["kernels"]["kinds"].items()} for row in rows}
        what = "kernel" if report["device"]["type"] == "cuda" else "operator"
        console.print(_by_kind(f"ms of a step, by kind of {what}", list(kinds), columns))
        for row in rows:
            console.print(f"longest of {row['name']}")
            for kernel in row["kernels"]["longest"]:
                line = f"  {kernel['ms']:9.2f} ms {kernel['calls']:6d}  {kernel['kind']:<18} {kernel['name']}"
                console.print(line, markup=False, soft_wrap=True)
    for row in rows:
        if "served" in row:
            console.print(f"{row['name']} is served by: {in_one_line(row['served'])}", markup=False, soft_wrap=True)
    for row in report["rows"]:
        if "error" in row:
            console.print(f"{row['name']} failed: {row['error']}", markup=False, soft_wrap=True)
    for note in report["notes"]:
        console.print(note, markup=False, soft_wrap=True)


def _device(workload: Workload, name: str, say: Callable[[str], None]) -> torch.device:
    if name == "auto" and not torch.cuda.is_available():
        if workload.gpu_only:
            raise ValueError(
                f"{workload.name} is for a GPU, and CUDA finds none here; try tiny_lora, or say --device cpu if that "
                "is what you want"
            )
        say("no CUDA device here: measured on the CPU, in fp32")
    return pick_device(name)


def _header(workload: Workload, cost: Arithmetic, device: torch.device) -> dict[str, Any]:
    gpu = device.type == "cuda"
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "liger-kernel", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    dtype = str(auto_dtype(device)).removeprefix("torch.")
    vocabulary = int(workload.config["vocab_size"]) if "vocab_size" in workload.config else None
    notes = [
        FORMULA,
        f"share of peak: of a {dtype} product of {'8192' if gpu else '1024'}-square random matrices, measured in the "
        "same run",
        "memory: " + ("most that torch had allocated while training" if gpu else "resident in the process, at most"),
        f"ours is trained by automodel train's step ({dtype} weights, and as optim says); the peers by torch's fused "
        f"AdamW on {dtype} parameters, without clipping",
    ]
    if vocabulary:
        notes.append(f"random tokens: a loss of about {math.log(vocabulary):.2f} is knowing nothing")
    return {
        "workload": {
            "name": workload.name,
            "method": workload.method,
            "rows": workload.rows,
            "length": workload.length,
            "config": dict(workload.config),
        },
        "device": {
            "type": device.type,
            "name": torch.cuda.get_device_name(device) if gpu else platform.processor() or platform.machine(),
        },
        "versions": versions,
        "flops": {
            "weights": cost.weights,
            "attention_forward_per_token": cost.attention,
            "per_token": cost.per_token(workload.lora is None),
            "formula": FORMULA,
        },
        "matmul_tflops": None,
        "rows": [],
        "notes": notes,
    }


class _Processes(AbstractContextManager["_Processes"]):
    """A fresh process for each of ``count`` rows, the next one started ahead where a GPU does the work."""

    def __init__(self, folder: Path, count: int, device: torch.device):
        self._folder, self._left, self._begun = folder, count, 0
        # on a CPU, or few of them, its imports would be measured
        self._ahead = device.type == "cuda" and _cores() >= 4
        self._running: list[subprocess.Popen[str]] = []
        """The one that measures, or will; behind it the next one."""

    def __exit__(self, *exc: object) -> None:
        for process in self._running:
            process.kill()
            process.communicate()

    def measure(self, request: Request) -> dict[str, Any]:
        """Whatever becomes of it is a row."""
        self._left -= 1
        if (package := _missing(request)) is not None:
            return {"error": f"{package} is not installed: pip install {package}"}
        while len(self._running) < (2 if self._ahead and self._left else 1):
            self._running.append(self._start())
        process, number = self._running[0], self._begun - len(self._running) + 1
        process.communicate(json.dumps(asdict(request)))
        self._running.pop(0)
        said, result_file = self._file("output", number).read_text(errors="replace"), self._file("result", number)
        if not result_file.is_file():
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            return {"error": f"the process ended with status {process.returncode}: {last}", "output": said[-4000:]}
        result: dict[str, Any] = json.loads(result_file.read_text())
        return result | {"output": said[-4000:]} if "error" in result else result

    def _start(self) -> "subprocess.Popen[str]":
        """One that imports, and waits for its request."""
        self._begun += 1
        module, result = "nemo_automodel.recipes.bench_variant", str(self._file("result", self._begun))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path))
        }  # also where nothing is installed
        with self._file("output", self._begun).open("w") as stream:
            return subprocess.Popen(
                [sys.executable, "-m", module, result],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                env=environment,
                text=True,
            )

    def _file(self, name: str, number: int) -> Path:
        return self._folder / f"{name}-{number}"


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _missing(request: Request) -> str | None:
    """A package that the variant takes and that is not there."""
    needed = {"liger_kernel": "liger-kernel"} if request.variant == "hf_liger" else {}
    if request.variant != OURS and request.lora:
        needed["peft"] = "peft"
    return next((package for module, package in needed.items() if find_spec(module) is None), None)


def _compare(report: dict[str, Any]) -> None:
    """Each row's share of the device's best matrix product, and its speed beside the first peer's (or row's)."""
    rows = [row for row in report["rows"] if "error" not in row]
    peers = [row for row in rows if row["variant"] != OURS]
    for row in rows:
        report["matmul_tflops"] = max(each["matmul_tflops"] for each in rows)
        row["share_of_peak"] = row["tflops"] / report["matmul_tflops"]
        row["ratio"] = row["tokens_per_second"] / (peers or rows)[0]["tokens_per_second"]


def _name(request: Request) -> str:
    return " ".join([request.variant, *request.overrides])


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['name']}: failed: {row['error'].splitlines()[0]}"
    return (
        f"{row['name']}: {row['tokens_per_second']:,.0f} tokens/s, {row['tflops']:,.3g} TFLOP/s, "
        f"{row['peak_gib']:.2f} GiB (built in {row['build_s']:.1f} s, trained for {row['steps_s']:.1f} s)"
    )


def _speed_table(report: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    workload = report["workload"]
    table = Table(
        title=f"{workload['name']}: {workload['method']}, {workload['rows']} x {workload['length']} tokens a step, "
        f"on {report['device']['name']} ({report['matmul_tflops']:,.3g} TFLOP/s in matrix products)",
        title_justify="left",
        box=box.SIMPLE,
    )
    beside = next((row["name"] for row in rows if row["ratio"] == 1.0), rows[0]["name"])
    table.add_column("variant")
    for heading in ("tokens/s", f"x {beside}", "TFLOP/s", "of peak", "ms/step", "GiB", "first loss", "last loss"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ratio']:.2f}",
            f"{row['tflops']:,.3g}",
            f"{row['share_of_peak']:.0%}",
            f"{row['step_ms']:,.1f}",
            f"{row['peak_gib']:.2f}",
            f"{row['loss_first']:.3f}",
            f"{row['loss_last']:.3f}",
        )
    return table


def _by_kind(title: str, headings: list[str], columns: dict[str, dict[str, float]]) -> Table:
    """Milliseconds, a column for each variant."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for heading in headings:
        cells = (f"{values[heading]:,.2f}" if heading in values else "" for values in columns.values())
        table.add_row(heading, *cells)
    return table
