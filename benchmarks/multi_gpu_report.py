"""Tables and verdicts from what `multi_gpu.py` measured."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

GIB = 2**30
FACTOR = 2.0
"""A mesh may be so many times as far from one GPU as one GPU is from itself: both have rounded."""
ALIKE = 1e-3
"""Relative: losses in bf16 of the same work are so near, whoever shares it (seen: 1e-4; where it was wrong, 6e-3)."""


def markdown(report: dict[str, Any]) -> str:
    """All sections that have rows, for RESULTS.md."""
    lines = [
        f"{report['machine']}, {report['ranks']} ranks, the median of {report['steps']} steps of the slowest rank."
    ]
    for section, (title, table) in TABLES.items():
        rows = [row for row in report["rows"].values() if row["section"] == section]
        if rows:
            lines += ["", f"### {title}", "", *table([row for row in rows if good(row)]), ""]
            lines += [
                f"- {row['name']} x{row['ranks']}: not measured: {row['skipped']}" for row in rows if row["skipped"]
            ]
            lines += [f"- {row['name']} x{row['ranks']}: failed: {row['error']}" for row in rows if "error" in row]
    return "\n".join(lines) + "\n"


def problems(report: dict[str, Any]) -> list[str]:
    """What failed, and what is not equal."""
    rows = report["rows"].values()
    found = [f"failed: {row['section']}: {row['name']}: {row['error']}" for row in rows if "error" in row]
    compared = [row for row in rows if row["section"] == "equality" and good(row)]
    for row in compared:
        if row.get("unequal"):
            found.append(f"not equal: the export by {row['name']}: {', '.join(row['unequal'][:5])}")
    for name in ("loss", "grad_norm"):
        bound = bound_of(compared, name)
        for row in compared if bound else ():
            apart = apart_of(compared, row, name)
            if row["values"]["role"] == "mesh" and not apart <= bound:
                found.append(f"not equal: {name} of {row['name']} is {apart:.2e} apart, beyond {bound:.2e}")
            if row["values"]["role"] == "wrong" and name == "loss" and apart <= bound:
                found.append(f"blind: {name} with more learning rate is {apart:.2e} apart, within {bound:.2e}")
    found += different_losses([row for row in rows if row["does"] == "speed" and good(row)])
    for row in rows:
        for rank, kill in row["kills"].items() if row["section"] == "kill" and good(row) else ():
            usual = row["usual"]["loss_apart"]
            if kill["loss_apart"] > FACTOR * usual or (row["usual"]["bitwise"] and not kill["bitwise"]):
                apart = f"losses {kill['loss_apart']:.2e} apart, of uninterrupted runs {usual:.2e}"
                found.append(f"not equal: the run whose rank {rank} was killed: {apart}")
    return found


def different_losses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of rows that did the same work, by the loss of every step: fast and wrong is no figure."""
    found, first = [], {}
    for row in rows:
        asked = [word in row["words"] for word in ("lora", "float8")]
        work = (row["model"], row["values"]["rows"], row["values"]["length"], *asked, data_of(row))
        reference = first.setdefault(work, row)
        apart = [abs(a / b - 1) for a, b in zip(row["losses"], reference["losses"], strict=False)]
        if not all(each <= ALIKE for each in apart):  # NaN is not
            apart.sort(key=lambda each: each if each == each else math.inf)
            found.append(f"not equal: losses of {row['name']} are {apart[-1]:.1e} from those of {reference['name']}")
    return found


def data_of(row: dict[str, Any]) -> int:
    """By how many groups of ranks, each with random rows of its own."""
    return int(row["ranks"]) // math.prod(map(int, re.findall(r"--mesh\.(?:tp|cp|pp) (\d+)", row["words"])))


def good(row: dict[str, Any]) -> bool:
    return "error" not in row and not row["skipped"]


def last_words(log: Path) -> str:
    """The line that names an error, or else the last one."""
    said = [line for line in log.read_text().splitlines() if line.strip()]
    named = [line for line in said if re.search(r"^\S*:? ?[\w.]*(Error|Exception)\b", line)]
    return (named or said or [""])[-1][:300]


def apart_of(rows: Sequence[dict[str, Any]], row: dict[str, Any], name: str) -> float:
    """Root of the mean square, over the steps, of the relative difference from one GPU's reference."""
    reference = next((each[name] for each in rows if each["values"]["role"] == "reference"), None)
    if reference is None:
        return math.nan
    differences = [(a - b) / b for a, b in zip(row[name], reference, strict=True)]
    return math.sqrt(sum(d * d for d in differences) / len(differences))


def bound_of(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """From what one GPU differs by from itself: again, in sums of another order, and in fp32; None if not measured."""
    own = [row for row in rows if row["values"]["role"] in ("again", "other sums", "fp32")]
    if len(own) < 3 or math.isnan(apart_of(rows, own[0], name)):
        return None
    return FACTOR * max(apart_of(rows, row, name) for row in own)


def table(columns: str, rows: Iterable[Sequence[str]]) -> list[str]:
    heads = columns.split(" | ")
    return ["| " + " | ".join(each) + " |" for each in (heads, ["---"] * len(heads), *rows)]


def equality(rows: list[dict[str, Any]]) -> list[str]:
    bounds = {name: bound_of(rows, name) for name in ("loss", "grad_norm")}
    cells = []
    for row in rows:
        apart = {name: apart_of(rows, row, name) for name in bounds}
        within = [apart[name] <= bound for name, bound in bounds.items() if bound is not None]
        export = "" if "unequal" not in row else "no" if row["unequal"] else "yes"
        name = row["name"] + (f" ({row['values']['what']})" if "what" in row["values"] else "")
        role = row["values"]["role"]
        judged = ("yes" if all(within) else "NO" if role == "mesh" else "no") if within else "not known"
        losses = f"{row['loss'][0]:.4f}, {row['loss'][-1]:.4f}"
        cells.append([name, losses, f"{apart['loss']:.1e}", f"{apart['grad_norm']:.1e}"])
        cells[-1] += [judged if role in ("mesh", "wrong") else "", export]
    shown = {name: "unknown" if bound is None else f"{bound:.1e}" for name, bound in bounds.items()}
    head = "| loss, first and last | loss apart | norm apart | within | export bitwise"
    return [
        "Relative differences from one GPU's bf16 run, root mean square over all steps; the bounds are "
        f"{FACTOR:g} times the largest of one GPU's own: loss {shown['loss']}, gradients' norm {shown['grad_norm']}.",
        "",
        *table(f"run {head}", cells),
    ]


def speed(rows: list[dict[str, Any]]) -> list[str]:
    """Efficiency is the speed of each GPU over that of the fewest GPUs that a series ran on."""
    cells = []
    for row in rows:
        series = row["values"]["series"]
        base = min((r for r in rows if r["values"]["series"] == series), key=lambda r: r["ranks"])
        each, base_each = (r["tokens_per_second"] / r["ranks"] for r in (row, base))
        efficiency = f"{each / base_each:.2f}" if base["ranks"] < row["ranks"] else ""
        peer = next((r for r in rows if r["does"] == "accelerate" and is_peer(row, r)), None)
        ratio = f"{row['tokens_per_second'] / peer['tokens_per_second']:.2f}" if peer else ""
        figures = [f"{1000 * row['step_s']:.1f}", f"{row['tokens_per_second']:,.0f}", f"{each:,.0f}"]
        figures += [efficiency, ratio, f"{row['peak'] / GIB:.1f}", f"{row['load_s']:.1f}", row.get("note", "")]
        cells.append([row["name"], str(row["ranks"]), *figures])
    head = "step ms | tokens/s | of each | efficiency | / accelerate | peak GiB | load s |"
    return table(f"what | GPUs | {head} note", cells)


def is_peer(row: dict[str, Any], peer: dict[str, Any]) -> bool:
    """Whether the peer did the same work on as many ranks."""
    alike = row["ranks"] == peer["ranks"] and row["values"]["length"] == peer["values"]["length"]
    return alike and row["does"] == "speed" and ("lora" in row["words"]) == ("lora" in peer["words"])


def formula(schedule: str, ranks: int, micro_batches: int) -> float:
    """The share of a step in which a rank waits, if a weight's gradient, an input's and a forward pass cost alike."""
    if schedule == "ZBVZeroBubble":
        return 0.0
    units = micro_batches * (2 if "Interleaved" in schedule else 1)
    return (ranks - 1) / ((3 if "ZeroBubble" in schedule else 1) * units + ranks - 1)


def pipeline(rows: list[dict[str, Any]]) -> list[str]:
    """A micro-batch's own time is the slope between few and many; what is left of a step is the bubble."""
    cells = []
    for row in rows:
        few, many = row["values"]["micro_batches"]
        seconds = {count: row["seconds"][str(count)] for count in (few, many)}
        own = (seconds[many] - seconds[few]) / (many - few)
        for count, all_of_it in seconds.items():
            tokens = count * row["values"]["length"] / all_of_it
            bubble = 1 - count * own / all_of_it
            expected = formula(row["values"]["schedule"], row["ranks"], count)
            figures = [f"{1000 * all_of_it:.1f}", f"{1000 * own:.2f}", f"{tokens:,.0f}"]
            figures += [f"{bubble:.3f}", f"{expected:.3f}", f"{row['peak'] / GIB:.1f}"]
            cells.append([row["values"]["schedule"], str(row["ranks"]), str(count), *figures])
    head = "ms | of each micro-batch | tokens/s | bubble | by the formula | peak GiB"
    return table(f"schedule | GPUs | micro-batches | {head}", cells)


def loading(rows: list[dict[str, Any]]) -> list[str]:
    cells = []
    for row in rows:
        sizes = [f"{row[name] / GIB:.2f}" for name in ("shard", "host_growth", "gpu_peak")]
        cells.append([row["name"], str(row["ranks"]), f"{row['load_s']:.1f}", *sizes])
    return table("mesh | GPUs | seconds | shard GiB | host's growth GiB | GPU's peak GiB", cells)


def saving(rows: list[dict[str, Any]]) -> list[str]:
    cells = []
    for row in rows:
        for kind, one in row["saves"].items():
            flying = f"{one['in_flight']}, {1000 * one['step_s']:.0f}" if one["step_s"] else ""
            figures = [f"{1000 * row['step_s']:.0f}", f"{one['blocked_s']:.2f}", f"{one['complete_s']:.2f}"]
            figures += [f"{one['host_growth'] / GIB:.2f}", flying, f"{row['bytes'] / 1e9:.2f}"]
            cells.append([row["name"], kind, *figures])
    head = "step ms | blocked s | complete s | host's growth GiB | steps in flight, ms | GB"
    return table(f"mesh | save | {head}", cells)


def killing(rows: list[dict[str, Any]]) -> list[str]:
    cells = []

    def equal(one: dict[str, Any]) -> str:
        return "bit for bit" if one["bitwise"] else f"losses {one['loss_apart']:.1e} apart"

    for row in rows:
        cells.append(["none, again", "", "", "", equal(row["usual"])])
        for rank, kill in row["kills"].items():
            figures = [f"{kill['noticed_s']:.2f}", f"{kill['again_s']:.1f}", str(kill["step"])]
            cells.append([f"{rank} of {row['values']['of']}", *figures, equal(kill)])
    head = "noticed after s | past its step again after s | step | as an uninterrupted run"
    return table(f"killed rank | {head}", cells)


TABLES: dict[str, tuple[str, Callable[[list[dict[str, Any]]], list[str]]]] = {
    "equality": ("Equality", equality),
    "speed": ("Llama-3-8B: speed and memory", speed),
    "cp": ("Llama-3-8B: one long sequence", speed),
    "pp": ("Llama-3-8B: pipeline schedules", pipeline),
    "load": ("Loading the 16 GB checkpoint", loading),
    "save": ("Saving while training goes on", saving),
    "kill": ("A killed rank", killing),
}
