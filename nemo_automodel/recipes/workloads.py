"""What `automodel bench` trains: shapes, rows and row length by name, or a folder with a config.json."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

SHORTEST = 64
"""A row divided by it is the shortest document; all lengths are as likely on a logarithmic scale."""

ROPE = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": ROPE,
}
SMALL: dict[str, Any] = {
    **LLAMA,
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_parameters": {**ROPE, "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}
TINY: dict[str, Any] = {
    **LLAMA,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training job.

    Attributes:
        name: as the user writes it.
        config: the fields of its ``config.json``.
        lora: rank of adapters on all projections, None for full training.
        rows: per optimizer step.
        length: tokens in a row.
        documents: whether rows hold several documents of mixed lengths, or each is one document.
        gpu_only: too large to try on a CPU unless that is asked for.
    """

    name: str
    config: Mapping[str, Any]
    lora: int | None
    rows: int
    length: int
    documents: bool = False
    gpu_only: bool = False

    @property
    def method(self) -> str:
        """How it trains, in words."""
        trained = "all weights" if self.lora is None else f"LoRA r={self.lora} on all projections"
        return f"{trained}, documents of mixed lengths" if self.documents else trained

    def write_config(self, folder: Path) -> None:
        """Write ``config.json`` into ``folder``."""
        (folder / "config.json").write_text(json.dumps(self.config))


def documents_of_step(rows: int, length: int, step: int) -> list[list[int]]:
    """The lengths of the documents in each row of a step, packed as training packs them."""
    from nemo_automodel.components.data import pack  # not above: the command line's help reads this file, without torch

    generator = random.Random(step)
    lengths = [max(2, int(length * SHORTEST ** -generator.random())) for _ in range(SHORTEST * rows)]
    return [[lengths[number] for number in row] for row in pack(lengths, length)[:rows]]


def mean_length(rows: int, length: int, steps: int) -> int:
    """Of the document of a token, in the mean over the tokens of so many steps."""
    all_rows = [row for step in range(steps) for row in documents_of_step(rows, length, step)]
    lengths = [each for row in all_rows for each in row]
    return round(sum(each * each for each in lengths) / sum(lengths))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="llama8b_lora",
            config=LLAMA
            | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
            | {"tie_word_embeddings": False},
            lora=16,
            rows=2,
            length=4096,
            gpu_only=True,
        ),
        Workload(
            name="qwen7b_lora",
            config={
                "model_type": "qwen2",
                "architectures": ["Qwen2ForCausalLM"],
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False,
                "rope_parameters": {**ROPE, "rope_theta": 1000000.0},
            },
            lora=16,
            rows=2,
            length=4096,
            gpu_only=True,
        ),
        Workload(
            name="llama1b_full",
            config=LLAMA
            | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
            | {"head_dim": 64, "tie_word_embeddings": True},
            lora=None,
            rows=4,
            length=4096,
            gpu_only=True,
        ),
        Workload(
            name="llama3b_full",
            config=LLAMA
            | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
            | {"head_dim": 128, "tie_word_embeddings": True},
            lora=None,
            rows=2,
            length=4096,
            gpu_only=True,
        ),
        Workload(name="smollm_full", config=SMALL, lora=None, rows=2, length=1024, gpu_only=True),
        Workload(name="smollm_lora", config=SMALL, lora=16, rows=2, length=1024, gpu_only=True),
        Workload(name="tiny_lora", config=TINY, lora=16, rows=2, length=128),
        Workload(name="tiny_full", config=TINY, lora=None, rows=2, length=128),
        Workload(name="tiny_packed", config=TINY, lora=None, rows=2, length=128, documents=True),
    )
}
for packed, whole in {"llama8b_packed": "llama8b_lora", "llama1b_packed": "llama1b_full"}.items():
    WORKLOADS[packed] = replace(WORKLOADS[whole], name=packed, documents=True)
"""By name. The first four are the sizes that dense fine-tuning is measured at; the next two wait for the host, whatever
the GPU; the tiny ones take seconds anywhere."""


def find_workload(
    name: str, *, lora: bool | None = None, rows: int | None = None, length: int | None = None
) -> Workload:
    """The workload of that name, or one of the folder's shapes.

    Args:
        name: a name in `WORKLOADS`, or a folder with a ``config.json``.
        lora: adapters (True) or full training (False); None takes the named workload's own, a folder has none.
        rows: instead of the workload's own; None in a folder: 1.
        length: likewise; None in a folder: 4096, or as many positions as the model has.

    Raises:
        ValueError: no such name or folder, a folder without ``lora``, rows or a length that cannot be.
    """
    for option, value in (("--rows", rows), ("--length", length)):
        if value is not None and value < (2 if option == "--length" else 1):
            raise ValueError(f"{option} {value} is too few to train on")
    workload = WORKLOADS.get(name)
    if workload is None:
        workload = _of_folder(name, lora)
    if lora is not None:
        workload = replace(workload, lora=(workload.lora or 16) if lora else None)
    workload = replace(workload, rows=rows or workload.rows, length=length or workload.length)
    positions = workload.config.get("max_position_embeddings")
    if positions is not None and workload.length > positions:
        raise ValueError(f"--length {workload.length} is more than the {positions} positions of {name}")
    return workload


def _of_folder(name: str, lora: bool | None) -> Workload:
    file = Path(name) / "config.json"
    if not file.is_file():
        near = get_close_matches(name, WORKLOADS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"{name!r} is neither a workload nor a folder with a config.json; {hint}workloads are "
            f"{', '.join(WORKLOADS)}"
        )
    if lora is None:
        raise ValueError(f"{name} is a folder: say --lora or --full")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    length = min(4096, config.get("max_position_embeddings") or 4096)
    return Workload(name=name, config=config, lora=16 if lora else None, rows=1, length=length)
