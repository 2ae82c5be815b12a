"""Bytes that a rank sends in a training step, by axis: counted on gloo ranks, beside the formulas of `automodel plan`.

    python benchmarks/comm_bytes.py                            # the meshes of CASES
    python benchmarks/comm_bytes.py --mesh.tp 2 --lora.r 8     # one of your own: any key of a training

A small Llama with random weights, rows of 64 random tokens, 8 a step and 2 at a time.
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from nemo_automodel.components.distributed import MeshConfig
from nemo_automodel.components.distributed.traffic import Traffic
from nemo_automodel.config import load_config
from nemo_automodel.recipes.building import build_optimizer, build_parts, build_pipeline
from nemo_automodel.recipes.meshes import build_mesh
from nemo_automodel.recipes.needs import traffic, work_of
from nemo_automodel.recipes.step import train_step
from nemo_automodel.recipes.train import TrainConfig
from nemo_automodel.verify.ranks import run_ranks

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
CASES = (
    "--mesh.dp_shard 2",
    "--mesh.dp_shard 3 --train.batch_size 12",
    "--mesh.dp_replicate 2 --mesh.dp_shard 2",
    "--mesh.tp 2",
    "--mesh.tp 2 --mesh.sequence_parallel false",
    "--mesh.tp 2 --model.gradient_checkpointing true",
    "--mesh.tp 2 --mesh.sequence_parallel false --model.gradient_checkpointing selective",
    "--mesh.tp 2 --mesh.dp_shard 2",
    "--mesh.tp 2 --mesh.dp_shard 2 --lora.r 4",
    "--mesh.tp 2 --lora.r 4 --lora.dora true --model.gradient_checkpointing true",
    "--mesh.cp 2",
    "--mesh.pp 2",
    "--mesh.pp 2 --mesh.dp_shard 2 --mesh.pp_schedule GPipe",
    "--mesh.pp 2 --mesh.tp 2",
    "--mesh.pp 2 --mesh.pp_schedule Interleaved1F1B",
    "--mesh.pp 2 --mesh.dp_shard 2 --mesh.pp_schedule ZBVZeroBubble",
    "--mesh.cp 4 --mesh.cp_method ring",
    "--mesh.cp 2 --mesh.cp_method ring --model.gradient_checkpointing true",
    "--mesh.cp 2 --mesh.tp 2 --model.gradient_checkpointing selective",
)


def compare(case: str, shape: dict[str, Any] = SHAPE) -> list[tuple[dict[str, int], dict[str, int]]]:
    """For each rank of the mesh in ``case``, axis -> bytes in one step: as counted, and as predicted."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        words = f"--output_dir {folder} --model.path {folder} --model.from_scratch {'lora' not in case} --data.train x"
        words += f" --data.max_length 64 --train.batch_size 8 --train.micro_batch_size 2 --train.device cpu {case}"
        config = load_config(TrainConfig, None, words.replace("True", "true").replace("False", "false").split())
        if config.lora is not None:
            write_weights(Path(folder))
        ranks = math.prod(size_or_one(getattr(config.mesh, axis)) for axis in ("pp", "dp_replicate", "cp", "tp"))
        ranks *= size_or_one(config.mesh.dp_shard)
        return run_ranks(ranks, one_step, config, timeout=300, preload=[__name__])


def size_or_one(size: int | None) -> int:
    return size or MeshConfig.pp


def write_weights(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)


def one_step(config: TrainConfig) -> tuple[dict[str, int], dict[str, int]]:
    """Train this rank for a step on random tokens, all of which are learned."""
    device = torch.device("cpu")
    mesh = build_mesh(config, device)
    torch.manual_seed(0)
    parts = build_parts(config, None, device, mesh)
    model = build_pipeline(parts, config, mesh) if mesh.pp > 1 else parts[0]
    optimizer = build_optimizer(model, config.optim, 0, mesh)
    work = work_of(config, mesh)
    rows = torch.randint(SHAPE["vocab_size"], (work.rows, work.length)).split(
        config.train.micro_batch_size or work.rows
    )
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in rows]
    with Traffic(mesh) as counted:
        train_step(model, optimizer, batches, 1e-3, device, mesh)
    predicted = traffic(parts, mesh, work, config.model.gradient_checkpointing)
    return counted.by_axis(), predicted


def main() -> None:
    cases = [" ".join(sys.argv[1:])] if sys.argv[1:] else CASES
    print(f"{'':90}{'axis':>14}{'counted':>14}{'predicted':>14}")
    for case in cases:
        counted, predicted = compare(case)[0]
        for axis in sorted(counted.keys() | predicted.keys()):
            print(f"{case:90}{axis:>14}{counted.get(axis, 0):>14,}{predicted.get(axis, 0):>14,}", flush=True)


if __name__ == "__main__":
    main()
