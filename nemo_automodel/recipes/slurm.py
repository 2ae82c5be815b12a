"""Write a Slurm batch file for a training on several machines."""

import argparse
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_automodel.recipes.exits import ExitCode
from nemo_automodel.recipes.launch import FlagParser

_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")
_MOST_RESTARTS = 20

_SCRIPT = """\
#!/bin/bash
{directives}
# Written by automodel slurm. One launcher per machine starts that machine's ranks. Before the time limit it gets
# SIGTERM: the ranks finish their step, save and end with {terminated}.
set -u
cd {folder}
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
attempt=${{SLURM_RESTART_COUNT:-0}}
# when one launcher has failed, the others notice or are ended after a minute
srun --ntasks-per-node=1 --wait=60{srun} \\
  {command} \\
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node {gpus} --max-restarts {restarts} \\
  --rdzv-endpoint "$host:$port" --rdzv-id "$SLURM_JOB_ID-$attempt"
code=$?
# srun gives the highest code of all machines; where one had bad input, a new start is of no use
if find {logs} -name error.json -newer "$0" -exec cat {{}} + 2>/dev/null | grep -q '"code": {bad_input}'; then
  code={bad_input}
fi
{requeue}exit $code
"""

_REQUEUE = """\
# {temporary}: a rank hung or was lost; {terminated}: out of time, and saved. The same command goes on from there
case $code in
  {temporary} | {terminated})
    if [ "$attempt" -lt {most} ]; then scontrol requeue "$SLURM_JOB_ID"; fi ;;
esac
"""


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What to ask Slurm for, in sbatch's words.

    Raises:
        ValueError: a value that sbatch would refuse, or misread.
    """

    nodes: int
    gpus_per_node: int
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    job_name: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    requeue: bool = False
    signal_before: int = 300
    max_restarts: int = 0
    sbatch: list[str] = field(default_factory=list)
    out: Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus_per_node", 1), ("cpus_per_task", 1), ("max_restarts", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        if not 0 < self.signal_before <= 65535:
            raise ValueError(f"--signal-before {self.signal_before}: Slurm takes 1 to 65535 seconds")
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise ValueError(f"--time {self.time}: expected minutes, HH:MM:SS, D-HH or D-HH:MM:SS")
        for name in ("partition", "account", "job_name", "mem"):
            if re.search(r"\s", getattr(self, name) or ""):
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)!r} must not hold a space")

    def directives(self, name: str, log: str) -> list[str]:
        """Options of sbatch, as they stand behind ``#SBATCH``."""
        lines = [f"--job-name={name}", f"--nodes={self.nodes}", "--ntasks-per-node=1"]
        lines += [f"--gpus-per-node={self.gpus_per_node}"]
        for option in ("time", "partition", "account", "cpus_per_task", "mem"):
            if (value := getattr(self, option)) is not None:
                lines.append(f"--{option.replace('_', '-')}={value}")
        lines += [f"--signal=TERM@{self.signal_before}", "--requeue" if self.requeue else "--no-requeue"]
        return [*lines, "--open-mode=append", f"--output={log}", *self.sbatch]


def slurm_parser(description: str = "") -> argparse.ArgumentParser:
    """Of the options; what it does not know is the training's configuration."""
    parser = FlagParser(
        prog="automodel slurm",
        usage="automodel slurm CONFIG.yaml [--key value ...] --nodes N --gpus-per-node N [options]",
        description=description,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )

    def add(flag: str, help: str, **options: Any) -> None:
        parser.add_argument(flag, help=help, **options)

    add("--nodes", "machines", type=int, required=True, metavar="N")
    add("--gpus-per-node", "and ranks on each of them", type=int, required=True, metavar="N")
    add("--time", "limit: minutes, HH:MM:SS, D-HH:MM:SS", metavar="TIME")
    add("--partition", "to run in", metavar="NAME")
    add("--account", "to charge", metavar="NAME")
    add("--job-name", "default: the name of output_dir", metavar="NAME")
    add("--cpus-per-task", "cores of a machine, for all its ranks", type=int, metavar="N")
    add("--mem", "host memory of a machine, as 200G", metavar="SIZE")
    add(
        "--requeue",
        f"put the job in the queue again, at most {_MOST_RESTARTS} times, when its exit code says that this helps: "
        f"{ExitCode.TEMPORARY} (hang, lost rank) or {ExitCode.TERMINATED} (saved before the time limit)",
        action="store_true",
    )
    add("--signal-before", "seconds before the limit that SIGTERM comes, to save (default: 300)", type=int, metavar="S")
    add("--max-restarts", "of lost workers within the job (default: 0)", type=int, metavar="K")
    add("--sbatch", "a further #SBATCH option, as --sbatch=--exclusive; may be repeated", action="append")
    add("--out", "file to write (default: JOB_NAME.sbatch)", type=Path, metavar="FILE")
    return parser


def split_options(words: Sequence[str]) -> tuple[SlurmOptions, list[str]]:
    """The options, and the words of the training's own command that are left.

    Raises:
        ValueError: an option is missing, or its value is of no use.
    """
    options, rest = slurm_parser().parse_known_args(list(words))
    return SlurmOptions(**vars(options)), rest


def write_script(options: SlurmOptions, words: Sequence[str], output_dir: Path) -> list[str]:
    """Write the batch file for ``automodel train WORDS``; lines that say how to submit it."""
    name = options.job_name or re.sub(r"\s", "-", output_dir.resolve().name)
    out = options.out or Path(f"{name}.sbatch")
    codes = {"temporary": int(ExitCode.TEMPORARY), "terminated": int(ExitCode.TERMINATED)}
    codes["bad_input"] = int(ExitCode.BAD_INPUT)
    own = shutil.which("automodel", path=str(Path(sys.executable).parent))
    program = [own] if own else [sys.executable, "-m", "nemo_automodel.cli"]
    script = _SCRIPT.format(
        directives="\n".join(f"#SBATCH {line}" for line in options.directives(name, f"{name}-%j.log")),
        folder=shlex.quote(str(Path.cwd())),
        logs=shlex.quote(str(output_dir / "logs")),
        command=shlex.join([*program, "train", *words]),
        gpus=options.gpus_per_node,
        restarts=options.max_restarts,
        # srun does not take this over from sbatch
        srun="" if options.cpus_per_task is None else f" --cpus-per-task={options.cpus_per_task}",
        requeue=_REQUEUE.format(most=_MOST_RESTARTS, **codes) if options.requeue else "",
        **codes,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(script)
    return [f"{out}: {options.nodes} x {options.gpus_per_node} ranks", f"submit it from here with: sbatch {out}"]
