"""Training: the configuration, and the only loop. Pretraining, SFT and LoRA are this loop with different configs."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn

from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.tokenizer import load_tokenizer
from nemo_automodel.components.checkpoint import TrainingCheckpoints, publish_folder
from nemo_automodel.components.checkpoint.training_state import (
    TrainingCheckpoint,
    random_state,
    restore_random_state,
)
from nemo_automodel.components.data import Audit, BatchStream, DataConfig, build_dataset
from nemo_automodel.components.layout import Layout
from nemo_automodel.components.loss import next_token_loss, valid_tokens
from nemo_automodel.components.metrics import MetricsLog, peak_memory_gb, plot_loss
from nemo_automodel.components.models.common.backend import BackendConfig
from nemo_automodel.components.optim import MasterAdamW, OptimConfig
from nemo_automodel.components.peft import LoRAConfig, apply_lora, load_adapter_tensors, merge_lora, save_adapter
from nemo_automodel.config import arg, dump_config, required
from nemo_automodel.recipes.checks import blame, check_lengths, check_packing, check_same_run, identity
from nemo_automodel.recipes.interrupts import stop_requests
from nemo_automodel.recipes.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True)
class ModelConfig:
    """Which model to train."""

    path: str = required("checkpoint folder, or a Hub id where a hub can be reached")
    from_scratch: bool = arg(False, "start from random weights: only config and tokenizer are read (pretraining)")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "of the weights; auto: bfloat16 on a GPU, else float32")
    attn_implementation: str | None = arg(None, "eager, sdpa, flex_attention, ...; null: what backend.attn says")
    backend: BackendConfig = arg(BackendConfig(), "which kernels serve the model")
    gradient_checkpointing: bool = arg(False, "recompute activations in the backward pass: slower, less memory")
    trust_remote_code: bool = arg(False, "run Python code that comes with the checkpoint")


@dataclass(kw_only=True)
class LoopConfig:
    """How long to train, in what batches, and what to write on the way.

    Raises:
        ValueError: a value out of range, by the field's name.
    """

    epochs: int = arg(1, "passes over the training data")
    max_steps: int | None = arg(None, "stop after so many optimizer steps instead")
    batch_size: int = arg(8, "rows (examples, or packed rows) per optimizer step")
    micro_batch_size: int | None = arg(None, "rows per forward pass; gradients accumulate; null: the whole batch")
    validate_every: int | None = arg(None, "optimizer steps between validations; null: once per epoch, and at the end")
    save_every: int | None = arg(None, "optimizer steps between checkpoints; null: once per epoch, and at the end")
    keep_last: int = arg(2, "checkpoints to keep; the one with the best validation loss is kept beside them")
    log_every: int = arg(1, "optimizer steps between rows in metrics.jsonl")
    seed: int = arg(0, "of the data order, adapters' start and dropout")
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto: a GPU where there is one")

    def __post_init__(self) -> None:
        for name in ("epochs", "max_steps", "batch_size", "micro_batch_size", "validate_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.keep_last < 1 or self.log_every < 1:
            raise ValueError(f"keep_last={self.keep_last} and log_every={self.log_every} must be at least 1")


@dataclass(kw_only=True)
class TrainConfig:
    """Everything a training run is made of."""

    output_dir: Path = required("folder for everything the run writes; the same command in it resumes the run")
    model: ModelConfig = required("the model")
    data: DataConfig = required("the data")
    train: LoopConfig = arg(LoopConfig(), "the loop")
    optim: OptimConfig = arg(OptimConfig(), "AdamW and its schedule")
    lora: LoRAConfig | None = arg(None, "train low-rank adapters only; set any key (or {}) to turn it on")


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        steps: optimizer steps done, over all its sessions.
        loss: training loss of the last step.
        val_loss: validation loss at the end, None without validation data.
        hf_folder: the trained model, in plain Hugging Face format.
        adapter_folder: the adapters in peft format, None without LoRA.
        seconds: wall time of this session's training.
        tokens_per_second: over this session.
    """

    steps: int
    loss: float
    val_loss: float | None
    hf_folder: Path
    adapter_folder: Path | None
    seconds: float
    tokens_per_second: float

    def lines(self) -> list[str]:
        """What was written where, for the user."""
        run = self.hf_folder.parent
        validation = "" if self.val_loss is None else f", validation loss {self.val_loss:.4f}"
        lines = [
            f"{self.steps} steps in {self.seconds / 60:.1f} min ({self.tokens_per_second:,.0f} tokens/s): "
            f"loss {self.loss:.4f}{validation}",
            f"  {self.hf_folder}: the trained model, plain Hugging Face format",
        ]
        if self.adapter_folder is not None:
            lines.append(f"  {self.adapter_folder}: the adapters, peft format (folded into hf as well)")
        lines.append(f"  {run / 'checkpoints'}: to resume from; {run / 'loss.png'}: the loss curve")
        lines.append(f"  {run / 'metrics.jsonl'}, {run / 'tensorboard'}: metrics; {run / 'config.yaml'}: this run")
        return lines


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, and what the user has."""


def train(config: TrainConfig, say: Callable[[str], None] = print) -> Summary:
    """Run, or resume, the training that ``config`` describes.

    Args:
        config: what to train on what.
        say: called with each line meant for the user.

    Raises:
        CheckpointError: the model, or a checkpoint to resume from, cannot be used.
        TrainingError: the loss or the gradients are not finite any more.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the step under way is done and saved.
        ValueError: the data cannot be used, or ``config`` is not the one this folder's run began with.
    """
    run = Run(config, say)
    with Progress(run.done, run.total_steps, say) as progress, stop_requests() as stop_requested:
        for step in range(run.done + 1, run.total_steps + 1):
            row = run.step(step)
            if run.is_due(step, config.train.validate_every or run.stream.batches_per_epoch) and run.validation:
                row["val_loss"] = run.validate(step)
            if run.is_due(step, config.train.log_every) or "val_loss" in row:
                run.metrics.log(step, **row)
            progress.update(step, row)
            if stop_requested() or run.is_due(step, config.train.save_every or run.stream.batches_per_epoch):
                run.save(step)
            if stop_requested() and step < run.total_steps:
                say(f"stopped after step {step}, which is saved; the same command goes on from there")
                raise KeyboardInterrupt
    return run.finish()


class Run:
    """One training run: everything is loaded, checked and, where its folder has a checkpoint, resumed on creation.

    The cheap checks come first: nothing long starts before the tokenizer, the data and the folder are known to do.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None]):
        self.config, self._say = config, say
        self.checkpoints = TrainingCheckpoints(config.output_dir / "checkpoints", config.train.keep_last)
        resumed = self.checkpoints.latest()
        check_same_run(config, resumed)
        self.device = pick_device(config.train.device)
        with blame("model.path"):
            self.tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
        if config.data.chat_template is not None:  # what the model learns is what must be saved beside it
            with blame("data.chat_template"):
                self.tokenizer.chat_template = Path(config.data.chat_template).expanduser().read_text()
        self._audits: dict[str, Audit] = {}
        self._longest = 0
        self.stream = self._stream("train", config.data.train, config.data.train_split)
        self.validation = None
        if config.data.validation is not None:
            self.validation = self._stream("validation", config.data.validation, config.data.validation_split)
        self.total_steps = config.train.max_steps or config.train.epochs * self.stream.batches_per_epoch

        torch.manual_seed(config.train.seed)
        self.model = build_model(config, resumed, self.device)
        check_lengths(self._longest, self.model.config)
        if config.data.packing:
            check_packing(self.model, self.device)
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        self.optimizer = MasterAdamW(trained, config.optim)
        self.done, self.loss = 0, float("nan")
        self.val_loss: float | None = None
        self._validated_at = 0
        if resumed:
            self._resume(resumed)
        say(_description(self.model, config, self.device, self.total_steps))
        config.output_dir.mkdir(parents=True, exist_ok=True)
        (config.output_dir / "config.yaml").write_text(dump_config(config))
        audits = {name: asdict(audit) for name, audit in self._audits.items()}
        (config.output_dir / "data_audit.json").write_text(json.dumps(audits, indent=2) + "\n")
        self.metrics = MetricsLog(config.output_dir, resume_step=self.done)
        self._started, self._tokens = time.perf_counter(), 0

    def is_due(self, step: int, every: int) -> bool:
        """Whether what happens ``every`` so many steps, and at the end, happens at ``step``."""
        return step == self.total_steps or step % every == 0

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step; returns the row for the metrics."""
        started = time.perf_counter()
        micro_batches = next(self.stream)
        lr = self.config.optim.lr_at(step - 1, self.total_steps)
        self.loss, norm = train_step(self.model, self.optimizer, micro_batches, lr, self.device, step)
        tokens = sum(batch["input_ids"].numel() for batch in micro_batches)
        self._tokens += tokens
        return {
            "loss": self.loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": tokens / (time.perf_counter() - started),
            "memory_gb": peak_memory_gb(self.device),
            "epoch": self.stream.epoch,
        }

    def validate(self, step: int) -> float:
        """Loss per valid token over the validation data, after ``step``."""
        assert self.validation is not None
        self._validated_at = step
        self.val_loss = loss = evaluate(self.model, self.validation, self.device)
        return loss

    def save(self, step: int) -> None:
        """A checkpoint that the same command resumes from."""
        self.checkpoints.save(
            step,
            write_model=lambda folder: save_trained(self.model, self.config, folder),
            tensors=self.optimizer.state_tensors() | random_state(),
            state={
                "stream": self.stream.state_dict(),
                "loss": self.loss,
                "val_loss": self.val_loss,
                "config": identity(self.config),
            },
            metric=self.val_loss if self._validated_at == step else None,
        )

    def finish(self) -> Summary:
        """Draw the loss curve and export: ``hf/``, and with LoRA ``adapter/`` too, folded into ``hf/``."""
        seconds, folder = time.perf_counter() - self._started, self.config.output_dir
        self.metrics.close()
        plot_loss(self.metrics.path, folder / "loss.png")
        adapter = None
        if self.config.lora is not None:
            adapter = publish_folder(folder / "adapter", lambda aside: save_trained(self.model, self.config, aside))
            merge_lora(self.model)

        def write(aside: Path) -> None:
            self.model.save_pretrained(aside)
            self.tokenizer.save_pretrained(aside)

        hf = publish_folder(folder / "hf", write)
        speed = self._tokens / seconds
        return Summary(self.total_steps, self.loss, self.val_loss, hf, adapter, seconds, speed)

    def _resume(self, checkpoint: TrainingCheckpoint) -> None:
        self.optimizer.load_state_tensors(checkpoint.tensors)
        self.stream.load_state_dict(checkpoint.state["stream"])
        restore_random_state(checkpoint.tensors)
        self.done, self.loss, self.val_loss = checkpoint.step, checkpoint.state["loss"], checkpoint.state["val_loss"]
        self._say(f"resuming after step {checkpoint.step} from {checkpoint.folder}")

    def _stream(self, name: str, source: str, split: str | None) -> BatchStream:
        data, loop = self.config.data, self.config.train
        with blame(f"data.{name}"):
            examples, self._audits[name] = build_dataset(source, split, self.tokenizer, data)
        self._longest = max(self._longest, max(map(examples.length, range(len(examples)))))
        self._say(self._audits[name].summary())
        return BatchStream(
            examples,
            batch_size=loop.batch_size,
            micro_batch_size=loop.micro_batch_size,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            packed_length=data.max_length if data.packing else None,
            shuffle=data.shuffle,
            seed=loop.seed,
        )


def train_step(
    model: nn.Module,
    optimizer: MasterAdamW,
    micro_batches: Sequence[dict[str, torch.Tensor]],
    lr: float,
    device: torch.device,
    step: int,
) -> tuple[float, float]:
    """One optimizer step: the loss per valid token over all micro-batches, and the gradients' norm before clipping.

    Raises:
        TrainingError: loss or gradients are not finite; the weights are as they were before the step.
    """
    valid = sum(valid_tokens(batch["labels"]) for batch in micro_batches)
    total = torch.zeros((), device=device)
    for batch in micro_batches:
        loss = next_token_loss(model, {name: value.to(device) for name, value in batch.items()}) / valid
        loss.backward()
        total += loss.detach()
    try:
        norm = optimizer.step(lr)
    except FloatingPointError as error:
        raise TrainingError(
            f"step {step}: the loss is {total.item():.4g} and {error}. Nothing was updated in this step, and "
            "checkpoints of earlier steps are intact. Lower optim.lr, or look at this step's data"
        ) from error
    return total.item(), norm


@torch.no_grad()
def evaluate(model: nn.Module, stream: BatchStream, device: torch.device) -> float:
    """Loss per valid token over one pass of the stream."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    valid = 0
    for batch in (batch for micro_batches in stream.one_pass() for batch in micro_batches):
        total += next_token_loss(model, {name: value.to(device) for name, value in batch.items()})
        valid += valid_tokens(batch["labels"])
    model.train()
    return total.item() / valid


def pick_device(name: str) -> torch.device:
    """The device of that name; ``"auto"`` is a GPU where there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"train.device={name!r} is not usable here: {error}") from error
    return torch.device(name)


def auto_dtype(device: torch.device) -> torch.dtype:
    """What ``model.dtype: auto`` means: bfloat16 on a GPU, float32 on a CPU, where bfloat16 is often slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build_model(config: TrainConfig, resumed: TrainingCheckpoint | None, device: torch.device) -> "PreTrainedModel":
    """The model to train, in training mode, with its adapters and with a checkpoint's weights where there is one."""
    options = config.model
    dtype = DTYPES.get(options.dtype, auto_dtype(device))
    common: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": options.attn_implementation,
        "backend": options.backend,
        "device": device,
        "trust_remote_code": options.trust_remote_code,
    }
    if resumed and config.lora is None:
        model = NeMoAutoModelForCausalLM.from_pretrained(resumed.model_folder, **common)
    elif options.from_scratch:
        model = NeMoAutoModelForCausalLM.from_config(options.path, **common)
    else:
        model = NeMoAutoModelForCausalLM.from_pretrained(options.path, **common)
    if config.lora is not None:
        apply_lora(model, config.lora, layout_of(model))
        if resumed:
            load_adapter_tensors(model, load_file(resumed.model_folder / "adapter_model.safetensors"))
    if options.gradient_checkpointing:
        # transformers 5.23 renamed it; 5.17 has the old name only
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model.train()


def layout_of(model: nn.Module) -> Layout:
    """The model's table of fused projections; empty for transformers' own classes."""
    adapter = getattr(model, "state_dict_adapter", None)
    return adapter.layout if adapter is not None else Layout(())


def save_trained(model: "PreTrainedModel", config: TrainConfig, folder: Path) -> None:
    """Write what was trained into ``folder``: the adapters in peft format, or the model in Hugging Face's."""
    folder.mkdir(exist_ok=True)
    if config.lora is not None:
        save_adapter(model, folder, config.lora, config.model.path)
    else:
        model.save_pretrained(folder)


def _description(model: "PreTrainedModel", config: TrainConfig, device: torch.device, total_steps: int) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    method = f"LoRA r={config.lora.r}" if config.lora else "all weights"
    return (
        f"{type(model).__module__.split('.')[0]}.{type(model).__name__}: {parameters / 1e6:,.1f} M parameters, "
        f"{trained / 1e6:,.1f} M trained ({method}), {dtype} on {device}, "
        f"attention {model.config._attn_implementation}; {total_steps} steps of {config.train.batch_size} rows"
    )
