"""What a rank of `multi_gpu.py` does: a training's parts, timed, by the functions that `automodel train` calls.

    python multi_gpu_ranks.py RESULT.json < REQUEST.json

Every rank runs it, and may be started long before its request is there; the leading one writes the result.
"""

import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from load_time import resident
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.models.llama import modeling_llama  # noqa: F401  # imports are not part of loading

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.checkpoint import SafetensorsReader
from nemo_automodel.components.distributed import Mesh, join_ranks
from nemo_automodel.components.models.llama import model as _ours  # noqa: F401  # likewise
from nemo_automodel.components.together import Together
from nemo_automodel.config import load_config
from nemo_automodel.recipes.building import build_optimizer, build_parts, build_pipeline
from nemo_automodel.recipes.meshes import build_mesh
from nemo_automodel.recipes.step import train_step
from nemo_automodel.recipes.train import Run, TrainConfig

WARM_UP, LR = 2, 1e-5


def config_of(request: dict[str, Any]) -> TrainConfig:
    common = f"--output_dir {request['scratch']}/run --model.path {request['folder']} --data.train "
    common += f"{request['folder']}/rows.jsonl --train.device {request['device']} {request['words']}"
    return load_config(TrainConfig, None, common.split())


class Job:
    """A training's parts on this rank, built as `Run` builds them, without data."""

    def __init__(self, request: dict[str, Any]):
        self.config = config_of(request)
        self.device = join_ranks(torch.device(request["device"]))
        self.mesh = build_mesh(self.config, self.device)
        self.parts: dict[int, Any] = {}

    def load(self) -> dict[str, float]:
        """Build the model; seconds, and bytes of this host process and this GPU, of the rank that has the most."""
        finish(self.device)
        before = forget_peak()
        start = time.perf_counter()
        self.parts = build_parts(self.config, None, self.device, self.mesh)
        finish(self.device)
        seconds = time.perf_counter() - start
        own = sum(local(p).nbytes for part in self.parts.values() for p in part.parameters())
        found = {"load_s": seconds, "host_growth": resident("VmHWM") - before, "shard": own}
        return largest({**found, "gpu_peak": gpu_peak(self.device)})

    def prepare(self) -> Callable[[int], Tensor]:
        """A function that trains for a step on so many rows, random but the same ones each time."""
        config, mesh = self.config, self.mesh
        model = build_pipeline(self.parts, config, mesh) if mesh.pp > 1 else self.parts[0]
        optimizer = build_optimizer(model, config.optim, config.train.seed, mesh)
        self.trained = model

        def step(rows: int) -> Tensor:
            batches = random_batches(self.parts, config, mesh, rows)
            return train_step(model, optimizer, batches, LR, self.device, mesh)[0]

        return step


def random_batches(parts: dict[int, Any], config: TrainConfig, mesh: Mesh, rows: int) -> list[dict[str, Tensor]]:
    """Of this rank's share of ``rows``; ranks that share rows have the same ones."""
    generator = torch.Generator().manual_seed(mesh.data_rank)
    vocabulary = next(iter(parts.values())).config.vocab_size
    ids = torch.randint(0, vocabulary, (rows // mesh.data, config.data.max_length), generator=generator)
    pieces = ids.split(config.train.micro_batch_size or len(ids))
    return [{"input_ids": each, "attention_mask": torch.ones_like(each), "labels": each} for each in pieces]


def speed(request: dict[str, Any]) -> dict[str, Any]:
    """Steps of the whole mesh."""
    job = Job(request)
    found = job.load()
    step = job.prepare()
    return found | timed_steps(lambda: step(request["rows"]), request, job.device)


def timed_steps(step: Callable[[], Any], request: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Tokens per second of all ranks together, from the slowest rank's median; its peak of memory."""
    reset_gpu_peak(device)
    times, losses = [], []
    for _ in range(WARM_UP + request["steps"]):
        finish(device)
        start = time.perf_counter()
        losses.append(float(step()))
        finish(device)
        times.append(time.perf_counter() - start)
    slowest = largest({"step_s": median(times[WARM_UP:]), "peak": gpu_peak(device)})
    tokens = request["rows"] * request["length"]
    return {**slowest, "tokens_per_second": tokens / slowest["step_s"], "times": times, "losses": losses}


def accelerate(request: dict[str, Any]) -> dict[str, Any]:
    """transformers' class under FSDP2 by accelerate, with peft's adapters, and AdamW on what it shards."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from transformers import AutoModelForCausalLM

    config, gpu = config_of(request), request["device"] == "cuda"
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        activation_checkpointing=bool(config.model.gradient_checkpointing),
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(mixed_precision="bf16", fsdp_plugin=plugin, cpu=not gpu)
    if not gpu:  # where it would take DDP instead, and the trial would try something else
        plugin.set_mixed_precision("bf16")
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    before, start = forget_peak(), time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=torch.bfloat16).train()
    if config.lora is not None:
        import peft

        adapters = peft.LoraConfig(
            r=config.lora.r, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, adapters, autocast_adapter_dtype=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=LR, fused=gpu))
    found = largest({"load_s": time.perf_counter() - start, "host_growth": resident("VmHWM") - before})
    generator = torch.Generator().manual_seed(Together().rank)
    shape = (request["rows"] // Together().size, request["length"])
    ids = torch.randint(0, request["vocabulary"], shape, generator=generator).to(accelerator.device)

    def step() -> Tensor:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    kinds = sorted({f"{type(p).__name__} {p.dtype}".replace("torch.", "") for p in model.parameters()})
    found["note"] = ", ".join(kinds)
    return found | timed_steps(step, request, accelerator.device)


def bubble(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the forward and backward passes alone, by the number of micro-batches."""
    job = Job(request)
    found: dict[str, Any] = job.load()
    step = job.prepare()
    inner, passes = job.trained.train_step, []

    def timed(*args: Any) -> Tensor:
        finish(job.device)
        dist.barrier()
        start = time.perf_counter()
        loss = inner(*args)
        finish(job.device)
        passes.append(time.perf_counter() - start)
        return loss

    job.trained.train_step = timed
    reset_gpu_peak(job.device)
    seconds = {}
    for count in request["micro_batches"]:
        passes.clear()
        for _ in range(WARM_UP + request["steps"]):
            step(count)
        seconds[str(count)] = largest({"s": median(passes[WARM_UP:])})["s"]
    return found | {"seconds": seconds} | largest({"peak": gpu_peak(job.device)})


def load(request: dict[str, Any]) -> dict[str, float]:
    """The checkpoint into this mesh."""
    return Job(request).load()


def load_transformers(request: dict[str, Any]) -> dict[str, float]:
    """By transformers' own tensor parallelism, until every parameter has been changed in place once."""
    from transformers import AutoModelForCausalLM

    device = join_ranks(torch.device(request["device"]))
    finish(device)
    before, start = forget_peak(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=torch.bfloat16, tp_plan="auto")
    parameters = [local(p.detach()) for p in model.parameters()]
    for parameter in parameters if device.type == "cpu" else ():  # else they are on the GPU already
        parameter.mul_(0.5)
    finish(device)
    seconds = time.perf_counter() - start
    found = {"load_s": seconds, "host_growth": resident("VmHWM") - before, "shard": sum(p.nbytes for p in parameters)}
    return largest({**found, "gpu_peak": gpu_peak(device)})


def equality(request: dict[str, Any]) -> dict[str, Any]:
    """Export what was loaded, and compare it bit for bit; then losses and norms of some steps."""
    config = config_of(request)
    config.train.max_steps, config.train.async_save = request["steps"], False
    run = Run(config, say=lambda line: None)
    found: dict[str, Any] = {}
    if request["export"]:
        run.save(0)
        run.export()
        if run.together.leads:
            found["unequal"] = unequal(Path(request["folder"]), config.output_dir / "hf")
            shutil.rmtree(config.output_dir / "checkpoints")
        run.together.sum(0.0)  # nobody goes on before
    for step in range(1, request["steps"] + 1):
        run.step(step)
        run.check_replicas(step)
        for _, row in run.rows(until=step):
            for name in ("loss", "grad_norm"):
                found.setdefault(name, []).append(row[name])
    return found


def unequal(one: Path, other: Path) -> list[str]:
    """Names of tensors that two checkpoints do not have alike, bit for bit."""
    readers = SafetensorsReader(one), SafetensorsReader(other)
    names = [set(reader) for reader in readers]
    common = sorted(names[0] & names[1])
    values = ((name, *(reader.read(name) for reader in readers)) for name in common)
    different = [name for name, a, b in values if a.dtype != b.dtype or not torch.equal(a, b)]
    return sorted(names[0] ^ names[1]) + different


def save(request: dict[str, Any]) -> dict[str, Any]:
    """Steps alone, then a save of each kind, with steps in flight: how long the loop stands still."""
    config = config_of(request)
    config.train.max_steps = 10**6
    run, number, saves = Run(config, say=lambda line: None), 0, {}

    def step() -> float:
        nonlocal number
        number += 1
        start = time.perf_counter()
        run.step(number)
        for _ in run.rows(until=number):
            pass
        return time.perf_counter() - start

    for _ in range(WARM_UP):
        step()
    alone = median(step() for _ in range(request["steps"]))
    for kind in ("asynchronous", "asynchronous again", "synchronous"):  # the first one makes its buffers
        os.sync()
        run.checkpoints.asynchronous = kind != "synchronous"
        before, start, flying = forget_peak(), time.perf_counter(), []
        run.save(number)
        blocked = time.perf_counter() - start
        while run.together.any((pending := run.checkpoints._pending) is not None and not pending.done()):
            flying.append(step())
        run.checkpoints.wait()
        complete = time.perf_counter() - start
        saves[kind] = largest(
            {"blocked_s": blocked, "complete_s": complete, "host_growth": resident("VmHWM") - before}
        ) | {"in_flight": len(flying), "step_s": median(flying) if flying else None}
        step()  # a checkpoint of the same step would be there already
    size = sum(file.stat().st_size for file in (config.output_dir / "checkpoints").rglob("*") if file.is_file())
    return {"step_s": alone, "saves": saves, "bytes": size}


def make(request: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of random weights in bf16."""
    folder = Path(request["folder"])
    torch.manual_seed(0)
    model = NeMoAutoModelForCausalLM.from_config(folder, device=request["device"], dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2GB")
    return {"bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}


def local(parameter: Tensor) -> Tensor:
    """This rank's shard."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def finish(device: torch.device) -> None:
    """Wait for what was queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gpu_peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def reset_gpu_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def forget_peak() -> int:
    """Begin a new high-water mark of the host's memory; returns the bytes of the process now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def largest(figures: dict[str, float]) -> dict[str, float]:
    """Of all ranks."""
    values = torch.tensor(list(figures.values()), dtype=torch.float64)
    if dist.is_initialized():
        if "gloo" not in str(dist.get_backend_config()):  # accelerate's ranks have NCCL alone
            values = values.cuda()
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return dict(zip(figures, values.tolist(), strict=True))


@contextmanager
def group_closed() -> Any:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    request = json.loads(sys.stdin.read())  # nothing, where nobody wants it any more
    os.environ["MASTER_PORT"] = str(request["port"])  # known last, so that nobody else takes it
    work = (accelerate, bubble, equality, load, load_transformers, make, save, speed)
    with group_closed():
        result = {function.__name__: function for function in work}[request["does"]](request)
        if Together().leads:
            Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
