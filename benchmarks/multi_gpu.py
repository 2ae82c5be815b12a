"""Several GPUs of one host, through NCCL: equality, speed, memory, loading, saving and a killed rank, in one command.

    python benchmarks/multi_gpu.py                            # all GPUs of this machine, every section
    python benchmarks/multi_gpu.py --only equality,speed      # some of them
    python benchmarks/multi_gpu.py --match "8192|ring" --again    # rows by a pattern in their names, measured anew
    python benchmarks/multi_gpu.py --stop-after 290 --limit 300   # where a command may take ten minutes: call it again
    python benchmarks/multi_gpu.py --tiny --ranks 2           # a trial on CPU ranks (gloo) with tiny models

Models have real shapes and random weights. Every row has ranks of its own and a time limit: one that fails is a line
with its error. ``results.json`` and ``results.md`` (for RESULTS.md) are written after each row, in ``--out``; rows that
are there already are not measured again, so the same command goes on where it was stopped. The exit code is 1 if a row
failed or found a difference.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from multi_gpu_report import last_words, markdown, problems
from multi_gpu_rows import LONGEST, SECTIONS, SHAPES, VOCABULARY, Row, rows_of

HERE = Path(__file__).parent
ALONE = ("load", "load_transformers", "save", "kill")
"""What rows do that measure the host."""
GRACE = 15
"""Seconds that the other ranks have once one has failed: theirs may be the words that say why."""


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the ranks would outlive this
    args.out.mkdir(parents=True, exist_ok=True)
    file, started = args.out / "results.json", time.monotonic()
    report = {"machine": machine(args.tiny), "ranks": args.ranks, "tiny": args.tiny, "steps": args.steps, "rows": {}}
    if file.exists():
        before = json.loads(file.read_text())
        if unlike := [name for name in ("machine", "ranks", "tiny", "steps") if before[name] != report[name]]:
            sys.exit(f"{file} is of another {', '.join(unlike)}; give another --out")
        report["rows"] = before["rows"]

    def measured(row: Row) -> bool:
        return "error" not in report["rows"].get(row.key, {"error": ""})

    rows = rows_of(args.ranks, args.tiny, args.only)
    rows = [row for row in rows if re.search(args.match, row.key) and (args.again or not measured(row))]
    with Started(args) as started_ranks:
        for row, following in zip_longest(rows, rows[1:]):
            if args.stop_after and time.monotonic() - started > args.stop_after:
                print("stopped; the same command goes on from here")
                break
            print(row.key, end=" ... ", flush=True)
            begun = time.monotonic()
            result = {"skipped": row.skipped} if row.skipped else started_ranks.measure(row, following)
            report["rows"][row.key] = {**asdict(row), **result, "wall_s": time.monotonic() - begun}
            print(result.get("error") or result.get("skipped") or f"{time.monotonic() - begun:.0f} s", flush=True)
            file.write_text(json.dumps(report, indent=1) + "\n")
            (args.out / "results.md").write_text(markdown(report))
    print(markdown(report))
    found = problems(report)
    print("\n".join(found))
    return int(bool(found))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="default: the GPUs there are; with --tiny: 2")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by commas (default %(default)s)")
    parser.add_argument("--match", default="", help="only rows with this pattern in their name")
    parser.add_argument("--again", action="store_true", help="also those that are measured already")
    parser.add_argument("--tiny", action="store_true", help="tiny models on CPU ranks: a trial of all of it")
    parser.add_argument("--steps", type=int, default=5, help="that are measured in a row (default %(default)s)")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a row (default %(default)s)")
    parser.add_argument("--stop-after", type=float, help="begin no row after so many seconds")
    parser.add_argument(
        "--out", type=Path, default=Path("build/multi_gpu"), help="folder of results (default %(default)s)"
    )
    scratch = Path(tempfile.gettempdir(), "multi_gpu")
    parser.add_argument("--scratch", type=Path, default=scratch, help="of checkpoints, 60 GB (default %(default)s)")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - SECTIONS.keys():
        parser.error(f"--only: {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    gpus = 2 if args.tiny else len(gpu_names())
    args.ranks = args.ranks or gpus
    if args.ranks < 2 or (args.ranks > gpus and not args.tiny):
        parser.error(f"{args.ranks} ranks on {gpus} GPUs: at least two, each with its own; --tiny tries it on CPUs")
    args.scratch = args.scratch / ("tiny" if args.tiny else "real")
    return args


def gpu_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def machine(tiny: bool) -> str:
    import torch
    import transformers

    names = [] if tiny else gpu_names()
    where = f"{len(names)} x {names[0]}" if names else f"{os.cpu_count()} CPU cores, gloo, tiny models"
    return f"{where}; torch {torch.__version__}, transformers {transformers.__version__}"


class Started(AbstractContextManager["Started"]):
    """The ranks of each row, and those of the next one ahead, which import while these work. Nobody outlives it."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self._ahead: dict[str, Ranks] = {}

    def __exit__(self, *exc: object) -> None:
        for ranks in self._ahead.values():
            ranks.stop()

    def measure(self, row: Row, following: Row | None) -> dict[str, Any]:
        """The row's result, or its ``error``."""
        ranks = self._ahead.pop(row.key, None) or Ranks(row, self._args)
        try:
            if row.model and "error" in (made := make(row.model, self._args)):
                return {"error": f"no model: {made['error']}"}
            # where imports would be measured, nobody makes any
            if following is not None and not (following.skipped or self._args.tiny or row.does in ALONE):
                self._ahead[following.key] = Ranks(following, self._args)
            return ranks.measure()
        finally:
            ranks.stop()


def make(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint, once: shapes, a tokenizer, texts to train on, and random weights."""
    folder, shape = args.scratch / name, SHAPES[args.tiny][name]
    if (folder / "complete").exists():
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(shape)))
    write_texts(folder, 48 if args.tiny else LONGEST.get(name, 48))
    result = Ranks(Row(section="make", name=name, ranks=1, does="make", model=name), args).measure()
    if "error" not in result:
        (folder / "complete").touch()
    return result


def write_texts(folder: Path, longest: int) -> None:
    """A tokenizer of words, and texts of unequally many: an even share of the tokens is no rank's."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<end>": 0} | {f"w{i}": i + 1 for i in range(VOCABULARY - 1)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(folder)
    lengths = [(longest - 1) * (4 + row % 5) // 8 for row in range(64)]
    texts = [" ".join(f"w{(i * i + 13 * row) % 1000}" for i in range(length)) for row, length in enumerate(lengths)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


class Ranks:
    """A row's ranks, each a process that imports what it needs and waits for its request."""

    def __init__(self, row: Row, args: argparse.Namespace):
        self._row, self._args = row, args
        self._logs = args.out / "logs" / "".join(c if c.isalnum() or c in "=.-" else "_" for c in row.key)
        shutil.rmtree(self._logs, ignore_errors=True)
        self._logs.mkdir(parents=True)
        script = "multi_gpu_kill.py" if row.does == "kill" else "multi_gpu_ranks.py"
        self._processes = [self._start(script, rank) for rank in range(row.ranks)]

    def _start(self, script: str, rank: int) -> "subprocess.Popen[str]":
        with (self._logs / f"{rank}.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, str(HERE / script), str(self._logs / "result.json")],
                env=environment(self._row, rank),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def measure(self) -> dict[str, Any]:
        """What they found, or the ``error``; all of them have ended when this returns."""
        row, args = self._row, self._args
        shutil.rmtree(args.scratch / "run", ignore_errors=True)
        shape = SHAPES[args.tiny].get(row.model, {})
        request = {"steps": args.steps, **row.values, "does": row.does, "words": row.words}
        request |= {"device": "cpu" if args.tiny else "cuda", "folder": str(args.scratch / row.model)}
        request |= {"scratch": str(args.scratch), "vocabulary": shape.get("vocab_size"), "port": free_port()}
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin:  # it has ended: `_wait` says how
                process.stdin.write(json.dumps(request))
        error = self._wait(args.limit * row.patience)
        shutil.rmtree(args.scratch / "run", ignore_errors=True)
        if error is not None:
            rank, what = error
            return {"error": f"rank {rank} {what}: {last_words(self._logs / f'{rank}.log')}"}
        result: dict[str, Any] = json.loads((self._logs / "result.json").read_text())
        return result

    def _wait(self, limit: float) -> tuple[int, str] | None:
        """Until all are done: None, or the rank that failed first, and how."""
        deadline, first = time.monotonic() + limit, None
        try:
            while any(process.poll() is None for process in self._processes) and time.monotonic() < deadline:
                failed = [(rank, p.returncode) for rank, p in enumerate(self._processes) if p.returncode]
                if failed and first is None:
                    first = failed[0][0], f"ended with {failed[0][1]}"
                    deadline = min(deadline, time.monotonic() + GRACE)
                time.sleep(0.1)
        finally:
            alive = self.stop()
        ended = [(rank, f"ended with {p.returncode}") for rank, p in enumerate(self._processes) if p.returncode]
        return first or ((alive[0], f"was not done after {limit:.0f} s") if alive else next(iter(ended), None))

    def stop(self) -> list[int]:
        """End those that have not ended, whose numbers it returns."""
        alive = [rank for rank, process in enumerate(self._processes) if process.poll() is None]
        for process in (self._processes[rank] for rank in alive):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return alive


def environment(row: Row, rank: int) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    own["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [own.get("PYTHONPATH")])])
    own.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // row.ranks)))
    # some machines may not have NVLink's multicast; said in the results
    own = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"} | own
    if row.ranks > 1:
        own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(row.ranks)}
        own["MASTER_ADDR"] = "127.0.0.1"
    return own


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
