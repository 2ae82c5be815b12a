"""What `multi_gpu.py` measures: every row, for so many ranks; nothing here imports torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_automodel.recipes.workloads import TINY, WORKLOADS

LORA = "--lora.r 16 --lora.alpha 32"
RECOMPUTED = "--model.gradient_checkpointing true"
VOCABULARY = 1001  # of the tokenizer beside the models, whose own is larger
STEPS = 20  # of a comparison of losses

REAL: Mapping[str, Mapping[str, Any]] = {
    "8b": WORKLOADS["llama8b_lora"].config,
    "1b": WORKLOADS["llama1b_full"].config,
    "small": WORKLOADS["llama1b_full"].config
    | {"num_hidden_layers": 8, "vocab_size": 32000, "tie_word_embeddings": False},
    "little": TINY | {"vocab_size": 1008, "num_attention_heads": 8, "num_key_value_heads": 8},
}
"""Models by name. The small one, whose losses are compared, has layers for eight stages; the little one is killed."""

LONGEST = {"1b": 4096, "small": 512}
"""Tokens of a model's texts; others have 48."""

_TINY = TINY | {"vocab_size": 1008, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 8}
SHAPES = {False: REAL, True: {"8b": _TINY, "1b": _TINY, "small": _TINY | {"tie_word_embeddings": False}}}
SHAPES[True]["little"] = SHAPES[True]["small"]
"""By whether they are tiny."""

_SHORTER = {2048: 32, 4096: 64, 8192: 128, 65536: 256, 512: 48}
"""Tokens of a row -> in a trial with tiny models."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement, by ranks of its own.

    Attributes:
        section: a name in `SECTIONS`.
        name: unlike any other's in its section.
        ranks: how many.
        does: the function of `multi_gpu_ranks` that they call.
        model: a name in `SHAPES`, made before.
        words: of a training's configuration.
        values: what else the function takes.
        skipped: why it cannot be measured; it is listed all the same.
        patience: how many times as long as other rows it may take.
    """

    section: str
    name: str
    ranks: int
    does: str
    model: str = ""
    words: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    skipped: str = ""
    patience: int = 1

    @property
    def key(self) -> str:
        """Of its result."""
        return f"{self.section}: {self.name} x{self.ranks}"


def rows_of(ranks: int, tiny: bool, sections: Sequence[str]) -> list[Row]:
    """All rows of these sections, in the order in which they run."""
    return [row for name in SECTIONS if name in sections for row in SECTIONS[name](ranks, tiny)]


def counts(ranks: int) -> list[int]:
    """1, 2, 4, ... and ``ranks``."""
    return sorted({ranks, *(2**i for i in range(ranks.bit_length()) if 2**i <= ranks)})


def meshes(ranks: int) -> dict[str, str]:
    """Name -> words: each axis alone, over all ranks, and their pairs."""
    axes = {"fsdp": "dp_shard", "hsdp": "dp_replicate", "tp": "tp", "cp": "cp", "pp": "pp"}
    found = {f"{name}={ranks}": f"--mesh.{axis} {ranks}" for name, axis in axes.items()}
    found[f"cp={ranks} ring"] = f"--mesh.cp {ranks} --mesh.cp_method ring"
    if ranks < 4 or ranks % 2:
        return found
    pairs = ("hsdp fsdp", "fsdp tp", "fsdp cp", "fsdp pp", "cp tp", "tp pp", "cp pp")
    for pair in pairs:
        one, other = pair.split()
        # tensor parallelism within, the pipeline without: ranks of the second axis are two
        words = f"--mesh.{axes[one]} {ranks // 2} --mesh.{axes[other]} 2"
        found[f"{one}={ranks // 2} {other}=2"] = words
    return found


def equality(ranks: int, tiny: bool) -> Iterator[Row]:
    """One GPU, again and rounded otherwise; then every mesh."""
    rows = max(8, 2 * ranks)
    length = _SHORTER[512] if tiny else 512
    common = f"--data.max_length {length} --train.batch_size {rows} --optim.lr {'1e-3' if tiny else '1e-4'}"
    two, bf16 = "--train.micro_batch_size 2", "--model.dtype bfloat16"
    one: dict[str, tuple[str, str]] = {
        "reference": (f"{bf16} {two}", "bf16, two rows at a time"),
        "again": (f"{bf16} {two}", "the same again"),
        "other sums": (f"{bf16} --train.micro_batch_size 4", "four rows at a time"),
        "fp32": (f"--model.dtype float32 {two}", "fp32"),
        "wrong": (
            f"{bf16} {two} --optim.lr {'1.1e-3' if tiny else '1.1e-4'}",
            "a tenth more learning rate: is it seen?",
        ),
    }
    for name, (words, what) in one.items():
        values = {"role": name, "what": what, "steps": STEPS, "export": name == "reference"}
        yield Row(
            section="equality",
            name=name,
            ranks=1,
            does="equality",
            model="small",
            words=f"{common} {words}",
            values=values,
        )
    compiled = {f"tp={ranks} compiled": f"--mesh.tp {ranks} --model.compile true"}
    for name, words in (meshes(ranks) | compiled).items():
        yield Row(
            section="equality",
            name=name,
            ranks=ranks,
            does="equality",
            model="small",
            words=f"{common} {bf16} {two} {words}",
            values={"role": "mesh", "steps": STEPS, "export": True},
        )


def speed(ranks: int, tiny: bool) -> Iterator[Row]:
    """Llama-3-8B: all weights under FSDP2, adapters under dp and tp, beside transformers' FSDP through accelerate."""

    def row(
        name: str, count: int, rows: int, length: int, words: str, does: str = "speed", series: str = "", **more: Any
    ) -> Row:
        own = _SHORTER[length] if tiny else length
        words = f"--train.batch_size {rows} --data.max_length {own} {words}"
        values = {"series": series or name, "rows": rows, "length": own}
        return Row(section="speed", name=name, ranks=count, does=does, model="8b", words=words, values=values, **more)

    for length, each in ((4096, 2), (8192, 1)):  # as many tokens for each GPU
        for count in counts(ranks):
            yield row(f"full, {length}, FSDP2, recomputed", count, each * count, length, RECOMPUTED)
        for name, words in (("selective", "--model.gradient_checkpointing selective"), ("all kept", "")):
            yield row(f"full, {length}, FSDP2, {name}", ranks, each * ranks, length, words)
        yield row(f"full, {length}, accelerate FSDP2", ranks, each * ranks, length, RECOMPUTED, "accelerate")
    for series, words in (("LoRA, 4096", LORA), ("LoRA, 4096, float8", f"{LORA} --lora.base_dtype float8")):
        yield row(f"{series}, one GPU", 1, 2, 4096, words, series=series)
        for count in counts(ranks)[1:]:
            copies = f"{words} --mesh.dp_replicate {count}"
            yield row(f"{series}, dp (replicated)", count, 2 * count, 4096, copies, series=series)
    for count in counts(ranks)[1:]:
        yield row("LoRA, 4096, dp (sharded)", count, 2 * count, 4096, LORA, series="LoRA, 4096")
    yield row("LoRA, 4096, accelerate FSDP2", ranks, 2 * ranks, 4096, LORA, "accelerate")
    ways = {
        "sequence parallel": "",
        "no sequence parallel": "--mesh.sequence_parallel false",
        "compiled": "--model.compile true",
    }
    for name, words in ways.items():  # one GPU's work, shared
        words = f"{LORA} --mesh.tp {ranks} {words}"
        yield row(f"LoRA, 4096, tp, {name}", ranks, 2, 4096, words, series="LoRA, 4096")
    reason = "not offered: torch's async tensor parallelism was slower here, with losses that were off (RESULTS.md)"
    yield row("LoRA, 4096, tp, async overlap", ranks, 2, 4096, f"{LORA} --mesh.tp {ranks}", skipped=reason)


def cp(ranks: int, tiny: bool) -> Iterator[Row]:
    """One sequence of 65,536 tokens."""
    length = _SHORTER[65536] if tiny else 65536
    words = f"--train.batch_size 1 --data.max_length {length} {RECOMPUTED}"
    ways = {"all to all": f"--mesh.cp {ranks}", "ring": f"--mesh.cp {ranks} --mesh.cp_method ring"}

    def row(method: str, count: int, name: str, more: str) -> Row:
        values = {"series": method, "rows": 1, "length": length}
        own = f"{words} {more} {LORA if method == 'LoRA' else ''}"
        name = f"{method}, {length}, {name}"
        return Row(section="cp", name=name, ranks=count, does="speed", model="8b", words=own, values=values)

    yield row("LoRA", 1, "one GPU", "")
    for name, more in ways.items():
        yield row("LoRA", ranks, name, more)
    for name, more in ways.items():
        yield row("full", ranks, name, more)


def pp(ranks: int, tiny: bool) -> Iterator[Row]:
    """Every schedule with few and with many micro-batches: what a micro-batch takes, and what the bubble."""
    length = _SHORTER[2048] if tiny else 2048
    for schedule in ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"):
        few, many = 2 * ranks, 4 * ranks
        words = f"--mesh.pp {ranks} --mesh.pp_schedule {schedule} --train.micro_batch_size 1 --train.batch_size {few}"
        yield Row(
            section="pp",
            name=schedule,
            ranks=ranks,
            does="bubble",
            model="8b",
            words=f"{words} --data.max_length {length}",
            values={"schedule": schedule, "micro_batches": [few, many], "length": length},
        )


def load(ranks: int, tiny: bool) -> Iterator[Row]:
    """The 8B checkpoint into every mesh, and by transformers' own tensor parallelism."""
    yield Row(section="load", name="one GPU", ranks=1, does="load", model="8b")
    for name, words in meshes(ranks).items():
        words += f" --train.batch_size {2 * ranks} --train.micro_batch_size 1"  # what a pipeline takes
        yield Row(section="load", name=name, ranks=ranks, does="load", model="8b", words=words)
    yield Row(section="load", name=f"transformers tp={ranks}", ranks=ranks, does="load_transformers", model="8b")


def save(ranks: int, tiny: bool) -> Iterator[Row]:
    """A 1B model, whose checkpoints (weights, masters and AdamW's state) have 17 GB."""
    length = _SHORTER[4096] if tiny else 4096
    words = f"--train.batch_size {ranks} --data.max_length {length} --data.overlong truncate --train.keep_last 1"
    for count in (1, ranks):
        own = words.replace(f"batch_size {ranks}", f"batch_size {count}")
        yield Row(section="save", name=f"fsdp={count}", ranks=count, does="save", model="1b", words=own)


def kill(ranks: int, tiny: bool) -> Iterator[Row]:
    """Trainings that lose their first rank, and their last."""
    words = f"--data.max_length 48 --train.batch_size {2 * ranks} --model.dtype float32"
    values = {"killed": [0, ranks - 1], "of": ranks}
    yield Row(
        section="kill",
        name=f"fsdp={ranks}",
        ranks=1,
        does="kill",
        model="little",
        words=words,
        values=values,
        patience=2,
    )


SECTIONS = {"equality": equality, "speed": speed, "cp": cp, "pp": pp, "load": load, "save": save, "kill": kill}
