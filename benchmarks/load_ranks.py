"""Load time and memory of a checkpoint on 1, 2 and 4 ranks, beside transformers with and without its ``tp_plan``.

    python benchmarks/load_ranks.py                 # about 4 GB of random bf16 weights, CPU ranks with gloo
    python benchmarks/load_ranks.py --layers 2 --runs 1

Every load runs in fresh processes, with the page cache warm. Seconds are those of the slowest rank from the call until
every parameter has been changed in place once, as the first optimizer step does (transformers maps the file and reads
nothing before). Peak is the largest growth of a rank's high-water mark over its shard's size; a mapped page that is
resident counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from load_time import make_checkpoint, resident

CASES = [("ours", "", 1), ("transformers", "", 1), ("ours", "fsdp", 2), ("ours", "tp", 2), ("transformers", "tp", 2)]
CASES += [("ours", "fsdp", 4), ("ours", "tp", 4), ("transformers", "tp", 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="decoder layers (default 32: about 4 GB)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rank", nargs=3, metavar=("LIBRARY", "MESH", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        print(json.dumps(load(args.rank[0], args.rank[1], Path(args.rank[2]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), args.layers, "1GB", vocab_size=32000)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB, {args.runs} runs each, median")
        print(f"{'':24}{'returned s':>12}{'updated s':>12}{'shard MB':>12}{'peak - shard MB':>18}")
        for library, mesh, ranks in CASES:
            try:
                rows = [run([__file__, "--rank", library, mesh, folder], ranks) for _ in range(args.runs)]
            except subprocess.CalledProcessError as error:
                print(
                    f"{library + ' ' + mesh + ' x' + str(ranks):24}  failed: exit status {error.returncode}", flush=True
                )
                continue
            cells = [f"{median(row[key] for row in rows):.2f}" for key in ("returned", "updated")]
            cells += [f"{rows[0]['shard'] / 1e6:.0f}"]
            print(f"{library + ' ' + mesh + ' x' + str(ranks):24}{cells[0]:>12}{cells[1]:>12}{cells[2]:>12}", end="")
            print(f"{max(row['over'] for row in rows) / 1e6:>18.0f}", flush=True)


def run(command: list[str], ranks: int, threads: int = 1) -> dict[str, Any]:
    """Call a script on so many ranks, each with so many threads: the largest of the figures they print as JSON."""
    with tempfile.TemporaryDirectory() as store:
        processes = []
        for rank in range(ranks):
            environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"STORE": f"file://{store}/store", "OMP_NUM_THREADS": str(threads)}
            process = subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True)
            processes.append(process)
        outputs = [process.communicate()[0] for process in processes]
    for process in processes:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
    rows = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {key: max(row[key] for row in rows) for key in rows[0]}


def load(library: str, mesh: str, folder: Path) -> dict[str, float]:
    auto, options = prepare(library, mesh)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    start = time.perf_counter()
    model = auto.from_pretrained(folder, dtype="bfloat16", **options)
    returned = time.perf_counter() - start
    held = update(model)
    updated = time.perf_counter() - start
    return {"returned": returned, "updated": updated, "shard": held, "over": resident("VmHWM") - before - held}


def prepare(library: str, mesh: str) -> tuple[Any, dict[str, Any]]:
    """The library's class to load with, imported, and its options; the ranks have met where there are several."""
    import torch.distributed as dist

    if library == "transformers":
        from transformers import AutoModelForCausalLM as Auto
        from transformers.models.llama import modeling_llama  # noqa: F401  # imports are not part of loading
    else:
        from nemo_automodel import NeMoAutoModelForCausalLM as Auto
        from nemo_automodel.components.models.llama import model as _  # noqa: F401
    if not mesh:
        return Auto, {}
    world = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    dist.init_process_group("gloo", init_method=os.environ["STORE"], **world)
    dist.barrier()
    return Auto, {"tp_plan": "auto"} if library == "transformers" else {"prepare": lambda model: shard(model, mesh)}


def update(model: Any) -> int:
    """Change every parameter in place; returns the bytes of this rank's."""
    from torch.distributed.tensor import DTensor

    parameters = [p.detach() for p in model.parameters()]
    locals_ = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    for parameter in locals_:
        parameter.mul_(0.5)
    return sum(parameter.nbytes for parameter in locals_)


def shard(model: Any, mesh: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    axis = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    columns, rows = ("self_attn.qkv_proj", "mlp.gate_up_proj"), ("self_attn.o_proj", "mlp.down_proj")
    for layer in model.model.layers:
        if mesh == "tp":
            plan = {name: ColwiseParallel() for name in columns} | {name: RowwiseParallel() for name in rows}
            parallelize_module(layer, axis, plan)
        else:
            fully_shard(layer, mesh=axis)
    if mesh == "fsdp":
        fully_shard(model, mesh=axis)


if __name__ == "__main__":
    main()
