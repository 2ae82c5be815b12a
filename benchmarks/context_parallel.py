"""Time and memory of a training step over one long sequence, by the ranks that share it.

    torchrun --nproc-per-node 2 benchmarks/context_parallel.py 16384 32768 65536

Four layers of Llama-3-8B's shape, bf16, random weights; each line is the slowest rank's median of five steps.
"""

import statistics
import sys
import time

import torch
import torch.distributed as dist
from transformers import LlamaConfig

from nemo_automodel.components.distributed import Mesh, Options, join_ranks, parallelize
from nemo_automodel.components.loss import next_token_loss
from nemo_automodel.components.models.llama.model import LlamaForCausalLM
from nemo_automodel.recipes.step import own_part
from nemo_automodel.recipes.transfer import inputs_of

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 1 << 20,
    "torch_dtype": "bfloat16",
}


def measure(length: int, mesh: Mesh, device: torch.device) -> tuple[float, float]:
    """Milliseconds of a step, and GiB at its peak."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    torch.set_default_dtype(torch.float32)
    parallelize(model, mesh, Options(tp_plan={}))
    ids = torch.randint(0, SHAPE["vocab_size"], (1, length))
    batch = own_part({"input_ids": ids, "labels": ids}, mesh)
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        next_token_loss(model, inputs_of(model, batch, device)).backward()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]) * 1000, torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    """Every length, by one rank and by all with each method."""
    device = join_ranks(torch.device("cuda"))
    ranks = dist.get_world_size()
    meshes = {"one rank": Mesh()}
    for method in ("all_to_all", "ring"):
        meshes[f"cp={ranks}, {method}"] = Mesh({"cp": ranks}, "cuda", cp_method=method)
    for length in map(int, sys.argv[1:]):
        for name, mesh in meshes.items():
            figures = torch.tensor(measure(length, mesh, device), device=device)
            dist.all_reduce(figures, dist.ReduceOp.MAX)
            if dist.get_rank() == 0:
                print(f"{length:>8} tokens, {name:<18} {figures[0]:9.1f} ms {figures[1]:7.2f} GiB", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
