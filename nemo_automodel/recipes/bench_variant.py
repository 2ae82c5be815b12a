"""One row of `automodel bench`, measured in a process of its own: Liger patches transformers for good.

python -m nemo_automodel.recipes.bench_variant RESULT.json < REQUEST.json
"""

import importlib
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_automodel.components.data import Batch, Example, collate, collate_packed
from nemo_automodel.components.loss import IGNORE
from nemo_automodel.components.metrics import peak_memory_gb
from nemo_automodel.components.optim import OptimConfig
from nemo_automodel.components.peft import LoRAConfig
from nemo_automodel.config import ConfigError, arg, load_config, required
from nemo_automodel.recipes.building import auto_dtype, build_model, build_optimizer
from nemo_automodel.recipes.flops import matmul_peak
from nemo_automodel.recipes.served import served
from nemo_automodel.recipes.step_parts import BACKWARD, OTHER, PARTS, PartTimer, between, kernel_table, now
from nemo_automodel.recipes.train import LoopConfig, ModelConfig, TrainConfig, train_step
from nemo_automodel.recipes.workloads import Workload, documents_of_step

OURS = "ours"
PEERS = ("hf", "hf_liger", "hf_compile")
LR = 1e-5
BATCHES = 4
"""Different batches, taken in turn: a loss that falls has learnt them by heart."""

_IDLE = ("epochs", "max_steps", "validate_every", "save_every", "async_save", "keep_last", "log_every", "device")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure.

    Attributes:
        variant: ``"ours"``, or a name in `PEERS`.
        overrides: of ours, as ``--backend.attn=flex``.
        folder: has the ``config.json``.
        lora: rank, None for all weights.
        rows: per optimizer step.
        length: tokens in a row.
        documents: whether rows hold several documents.
        steps: that are measured.
        warmup: steps before them.
        profile: whether to make the table of kernels.
        parts: whether to tell the parts of a step apart.
        device: ``cpu``, ``cuda``, ...
    """

    variant: str
    overrides: tuple[str, ...] = ()
    folder: str
    lora: int | None
    rows: int
    length: int
    documents: bool = False
    steps: int
    warmup: int
    profile: bool
    parts: bool = True
    device: str

    @classmethod
    def of(cls, workload: Workload, folder: str, **options: Any) -> "Request":
        """Ours on the workload, whose ``config.json`` is in ``folder``; the ``options`` say how to measure."""
        shape = {"rows": workload.rows, "length": workload.length, "documents": workload.documents}
        return cls(**{"variant": OURS, "folder": folder, "lora": workload.lora, **shape, **options})


@dataclass(kw_only=True)
class Documents:
    """How documents of mixed lengths become rows."""

    packing: bool = arg(True, "several in a row; else one in each, padded to the longest of a forward pass")


@dataclass(kw_only=True)
class BenchConfig:
    """The sections of a training's configuration that make a step what it is."""

    model: ModelConfig = required("the model")
    train: LoopConfig = arg(LoopConfig(), "rows per step and per forward pass")
    optim: OptimConfig = arg(OptimConfig(), "the optimizer")
    lora: LoRAConfig | None = arg(None, "adapters")
    data: Documents = arg(Documents(), "of a workload of documents")


class Job:
    """A model under training: what every variant offers to be measured by.

    Attributes:
        model: for its backbone.
        optimizer: has ``step``.
        step: one optimizer step on a batch, or on micro-batches, giving the loss as a number or a tensor on the device.
    """

    def __init__(self, model: Any, optimizer: Any, step: Callable[..., Any]):
        self.model, self.optimizer, self.step = model, optimizer, step

    @property
    def backbone(self) -> nn.Module:
        """The model less its head."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return cast("nn.Module", base.base_model)


def our_config(request: Request) -> BenchConfig:
    """The configuration of ours: the workload's, with the request's overrides.

    Raises:
        ConfigError: an override that does not exist, cannot be, or would change nothing.
    """
    words = [
        f"--model.path={request.folder}",
        "--model.from_scratch=true",
        f"--train.batch_size={request.rows}",
        f"--optim.lr={LR}",
        *([f"--lora={{r: {request.lora}, alpha: 32}}"] if request.lora else []),
    ]
    if not request.documents and (idle := [word for word in request.overrides if "data.packing" in word]):
        raise ConfigError([f"{idle[0]}: would change nothing here, where rows are one document each"])
    return bench_config(words, request.overrides)


def bench_config(words: Sequence[str], overrides: Sequence[str]) -> BenchConfig:
    """The configuration that ``words`` say, as `load_config` takes them, under ``overrides``.

    Args:
        words: whatever they like.
        overrides: as ``optim.lr=1e-4``, with ``backend.`` for ``model.backend.``; no key that a step does not use.

    Raises:
        ConfigError: an override that does not exist, cannot be, or would change nothing.
    """
    words = list(words)
    for override in overrides:
        name, _, value = override.removeprefix("--").partition("=")
        name = f"model.{name}" if name.split(".")[0] == "backend" else name
        if name in (f"train.{key}" for key in _IDLE) or name in ("model.path", "model.from_scratch"):
            raise ConfigError([f"{name}={value}: would change nothing here"])
        words.append(f"--{name}={value}")
    return load_config(BenchConfig, None, words)


def our_job(config: BenchConfig, device: torch.device, packing: bool = False) -> Job:
    """This library's: built, adapted and trained by what `automodel train` uses."""
    torch.manual_seed(config.train.seed)
    model = build_model(cast("TrainConfig", config), None, device, packing)
    optimizer = build_optimizer(model, config.optim, config.train.seed)
    size = config.train.micro_batch_size or config.train.batch_size

    def step(batch: Batch | list[Batch], lr: float = config.optim.lr) -> Any:
        parts = batch if isinstance(batch, list) else _cut(batch, size)
        return train_step(model, optimizer, parts, lr, device)[0]

    return Job(model, optimizer, step)


def _cut(batch: Batch, size: int) -> list[Batch]:
    rows = len(batch["input_ids"])
    return [{name: value[i : i + size] for name, value in batch.items()} for i in range(0, rows, size)]


def peer_job(request: Request, device: torch.device) -> Job:
    """transformers' class with sdpa and peft's adapters, AdamW on the parameters as they are."""
    config = AutoConfig.from_pretrained(request.folder)
    if request.variant == "hf_liger":
        _patch_by_liger(config.model_type)
    torch.manual_seed(0)
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=auto_dtype(device), attn_implementation="sdpa")
    base = model.train()
    if request.lora:
        peft = _import("peft", "peft")
        adapters = peft.LoraConfig(
            r=request.lora, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, adapters, autocast_adapter_dtype=False)
    if request.variant == "hf_compile":
        for module in base.modules():
            if type(module).__name__ in base._no_split_modules:
                module.compile()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=True)

    def step(batch: Batch) -> Tensor:
        ids = batch["input_ids"].to(device)
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Job(model, optimizer, step)


def measure(request: Request) -> dict[str, Any]:
    """Build the variant, train it, and say how fast it was."""
    device = torch.device(request.device)
    gpu = device.type == "cuda"
    if gpu and device.index is not None:
        torch.cuda.set_device(device)
    peak = matmul_peak(device, auto_dtype(device))
    started = time.perf_counter()
    config = our_config(request) if request.variant == OURS else None
    packing = config is not None and request.documents and config.data.packing
    job = peer_job(request, device) if config is None else our_job(config, device, packing)
    batches, tokens = _batches(request, config, job.model.config.vocab_size)
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    built = time.perf_counter()
    losses = [_kept(job.step(batches[i % BATCHES])) for i in range(request.warmup)]
    marks = [now(device)]
    for i in range(request.steps):
        losses.append(_kept(job.step(batches[(request.warmup + i) % BATCHES])))
        marks.append(now(device))
    if gpu:
        torch.cuda.synchronize(device)
    ended = time.perf_counter()
    losses = [float(loss) for loss in losses]
    if not all(map(math.isfinite, losses)):
        raise FloatingPointError(f"the losses are not finite: {losses}")
    times = [between(*pair) for pair in pairwise(marks)]
    of_a_token = [ms / tokens[(request.warmup + i) % BATCHES] for i, ms in enumerate(times)]
    memory = peak_memory_gb(device) * 1e9 / 2**30
    result = {
        "tokens_per_second": 1e3 / median(of_a_token),
        "step_ms": median(times),
        "steps_ms": times,
        "peak_gib": memory,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "build_s": built - started,
        "steps_s": ended - built,
        "matmul_tflops": peak / 1e12,
        "parts_ms": _parts(job, batches, device) if request.parts else {},
    }
    if request.variant == OURS:
        result["served"] = served(job.model, our_config(request).model, packing)
    if request.profile:
        result["kernels"] = kernel_table(lambda: job.step(batches[0]), device)
    return result


def _parts(job: Job, batches: list[Any], device: torch.device) -> dict[str, float]:
    """Medians over three more steps; the first one with hooks is not counted."""
    timer, rows = PartTimer(device), []
    with timer.watching(job.backbone, job.optimizer):
        for batch in batches:
            timer.begin(OTHER)
            job.step(batch)
            timer.begin(OTHER)
            rows.append(timer.milliseconds())
    medians = {part: median(row[part] for row in rows[1:]) for part in PARTS}
    return medians if medians[BACKWARD] else {}


def _batches(request: Request, config: BenchConfig | None, vocabulary: int) -> tuple[list[Any], list[int]]:
    """Random tokens, as the trainer's data comes: collated on the host. And how many of them each step trains on."""
    generator = torch.Generator().manual_seed(0)

    def example(length: int) -> Example:
        ids = torch.randint(0, vocabulary, (length,), generator=generator)
        labels = ids.clone()
        labels[0] = IGNORE  # or a packed document would be predicted by the one before it
        return Example(ids, labels)

    rows = request.rows if config is None else config.train.batch_size
    if config is None or not request.documents:
        steps = [[example(request.length) for _ in range(rows)] for _ in range(BATCHES)]
        return [collate(step, pad_token_id=0) for step in steps], [rows * request.length] * BATCHES
    at_once, batches, tokens = config.train.micro_batch_size or rows, [], []
    for number in range(BATCHES):
        packed = [[example(length) for length in row] for row in documents_of_step(rows, request.length, number)]
        alone = [each for row in packed for each in row]
        tokens.append(sum(map(len, alone)))
        if config.data.packing:
            batches.append([collate_packed(part, request.length, 0) for part in _chunks(packed, at_once)])
        else:
            batches.append([collate(part, 0) for part in _chunks(alone, at_once)])
    return batches, tokens


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _kept(loss: Any) -> Any:
    """A loss on the device must not wait for it, and its memory may be used again."""
    return loss.detach().clone() if isinstance(loss, Tensor) else loss


def _patch_by_liger(model_type: str) -> None:
    liger = _import("liger_kernel.transformers", "liger-kernel")
    patch = getattr(liger, f"apply_liger_kernel_to_{model_type}", None)
    if patch is None:
        raise ValueError(f"liger-kernel has no kernels for {model_type}")
    patch()


def _import(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{error}: pip install {package}") from error


def main() -> None:
    """Measure the request that comes by standard input, write what came of it into the file."""
    result_file = Path(sys.argv[1])
    options = json.load(sys.stdin)  # it may come long after all is imported
    request = Request(**{**options, "overrides": tuple(options["overrides"])})
    try:
        result = measure(request)
    except Exception as error:  # a row of the table, whatever it is
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    result_file.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
