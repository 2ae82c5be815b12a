"""Training: the configuration, and the only loop. Pretraining, SFT and LoRA are this loop with different configs."""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from nemo_automodel._transformers.tokenizer import load_tokenizer
from nemo_automodel.components.checkpoint import CheckpointError, TrainingCheckpoints
from nemo_automodel.components.checkpoint.training_state import (
    TrainingCheckpoint,
    random_state,
    restore_random_state,
)
from nemo_automodel.components.data import Audit, BatchStream, DataConfig, build_dataset
from nemo_automodel.components.distributed import Mesh, MeshConfig, Pipeline, diverged, join_ranks, saved_name
from nemo_automodel.components.metrics import MetricsLog, peak_memory_gb, plot_loss
from nemo_automodel.components.models.common.backend import BackendConfig
from nemo_automodel.components.models.common.te.modules import float8_state
from nemo_automodel.components.optim import OptimConfig
from nemo_automodel.components.peft import LoRAConfig
from nemo_automodel.components.together import Together
from nemo_automodel.config import arg, dump_config, required
from nemo_automodel.recipes.building import (
    build_optimizer,
    build_parts,
    build_pipeline,
    let_lengths_recur,
    pick_device,
)
from nemo_automodel.recipes.checks import (
    FORMAT,
    blame,
    check_format,
    check_lengths,
    check_packing,
    check_same_run,
    identity,
)
from nemo_automodel.recipes.exits import ExitCode
from nemo_automodel.recipes.export import export_from, export_trained, save_description, untied
from nemo_automodel.recipes.interrupts import Stopped, stop_requests
from nemo_automodel.recipes.meshes import build_mesh
from nemo_automodel.recipes.progress import Progress
from nemo_automodel.recipes.served import in_one_line, served
from nemo_automodel.recipes.step import evaluate, train_step
from nemo_automodel.recipes.transfer import Numbers
from nemo_automodel.recipes.watchdog import mark, watched

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(kw_only=True)
class ModelConfig:
    """Which model to train."""

    path: str = required("checkpoint folder, or a Hub id where a hub can be reached")
    from_scratch: bool = arg(False, "start from random weights: only config and tokenizer are read (pretraining)")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "of the weights; auto: bfloat16 on a GPU, else float32")
    attn_implementation: str | None = arg(None, "eager, sdpa, flex_attention, ...; null: what backend.attn says")
    backend: BackendConfig = arg(BackendConfig(attn="auto"), "which kernels serve the model")
    gradient_checkpointing: Literal[False, True, "selective"] = arg(
        False,
        "recompute activations in the backward pass: slower, less memory; selective: all but products and attention",
    )
    float8: Literal["off", "tensorwise", "rowwise", "rowwise_with_gw_hp"] = arg(
        "off", "train all weights with products in float8, by torchao (Hopper, Ada or later); fastest with compile"
    )
    compile: bool = arg(False, "compile each layer (torch.compile); the first steps take minutes longer")
    cuda_graphs: Literal["auto", True, False] = arg(
        "auto", "launch a forward and backward pass as a whole; auto: on one GPU (Hopper) that would wait for the host"
    )
    cpu_offload: bool = arg(False, "keep parameters and the optimizer in host memory (FSDP2): slow, for a small GPU")
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
    async_save: bool = arg(True, "write checkpoints in the background, from a copy in host memory")
    keep_last: int = arg(2, "checkpoints to keep; the one with the best validation loss is kept beside them")
    check_replicas_every: int | None = arg(
        500, "optimizer steps between checks that copies of a parameter are equal on all ranks (and at the first three)"
    )
    log_every: int = arg(1, "optimizer steps between rows in metrics.jsonl")
    seed: int = arg(0, "of the data order, adapters' start and dropout")
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto: a GPU where there is one")
    hang_timeout: float | None = arg(
        1800.0, "seconds without progress until the ranks end, saying which hangs; null: off"
    )

    def __post_init__(self) -> None:
        for name in (
            *("epochs", "max_steps", "batch_size", "micro_batch_size", "validate_every", "save_every"),
            "check_replicas_every",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.keep_last < 1 or self.log_every < 1:
            raise ValueError(f"keep_last={self.keep_last} and log_every={self.log_every} must be at least 1")
        if self.hang_timeout is not None and self.hang_timeout < 1:
            raise ValueError(f"hang_timeout={self.hang_timeout} must be at least 1 second; null turns it off")


@dataclass(kw_only=True)
class TrainConfig:
    """Everything a training run is made of."""

    output_dir: Path = required("folder for everything the run writes; the same command in it resumes the run")
    model: ModelConfig = required("the model")
    data: DataConfig = required("the data")
    train: LoopConfig = arg(LoopConfig(), "the loop")
    optim: OptimConfig = arg(OptimConfig(), "AdamW and its schedule")
    mesh: MeshConfig = arg(MeshConfig(), "how several ranks share the work")
    lora: LoRAConfig | None = arg(None, "train low-rank adapters only; set any key (or {}) to turn it on")

    def __post_init__(self) -> None:
        if self.lora is not None and self.model.from_scratch:
            raise ValueError("model.from_scratch=true with lora: the random weights under the adapters would be lost")
        if self.lora is not None and self.model.float8 != "off":
            raise ValueError(
                f"model.float8={self.model.float8} trains all weights; with lora set lora.base_dtype=float8 instead"
            )
        self._check_transformer_engine()

    def _check_transformer_engine(self) -> None:
        backend = self.model.backend
        if backend.linear == "te" and self.model.float8 != "off":
            raise ValueError(
                f"model.float8={self.model.float8} is torchao's and backend.linear='te' is Transformer Engine's: leave "
                "model.float8 at off and set model.backend.te_fp8"
            )
        if backend.te_fp8 is None:
            return
        if self.model.gradient_checkpointing:
            backend.te_fp8.refuse_recomputation()
        if backend.te_fp8.looks_back and self.mesh.pp > 1:
            raise ValueError(
                f"te_fp8.recipe='delayed' does not go with mesh.pp={self.mesh.pp}: all ranks tell each other what they "
                "saw, at the end of a forward pass that stages have at different times. Use 'current' or 'block'"
            )


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

    exit_code = ExitCode.BAD_INPUT


@watched
def train(config: TrainConfig, say: Callable[[str], None] = print) -> Summary:
    """Run, or resume, the training that ``config`` describes.

    Args:
        config: what to train on what.
        say: called with each line meant for the user.

    Raises:
        CheckpointError: the model, or a checkpoint to resume from, cannot be used.
        TrainingError: the loss or the gradients are not finite any more.
        Stopped: after Ctrl-C or SIGTERM, once the step under way is done and saved.
        ValueError: the data cannot be used, or ``config`` is not the one this folder's run began with.
    """
    run = Run(config, say)
    with Progress(run.done, run.total_steps, run.say) as progress, stop_requests() as stop_requested:
        for step in range(run.done + 1, run.total_steps + 1):
            run.step(step)
            run.check_replicas(step)
            stop = run.together.any(stop_requested())
            saves = stop or run.is_due(step, config.train.save_every or run.stream.batches_per_epoch)
            validates = run.validation and run.is_due(step, config.train.validate_every or run.stream.batches_per_epoch)
            for at, row in run.rows(until=step if saves or validates else step - run.ahead):
                if validates and at == step:
                    row["val_loss"] = run.validate(step)
                if run.metrics and (run.is_due(at, config.train.log_every) or "val_loss" in row):
                    run.metrics.log(at, **row)
                progress.update(at, row)
            if saves:
                run.save(step)
            if stop and step < run.total_steps:
                run.checkpoints.wait()
                run.say(f"stopped after step {step}, which is saved; the same command goes on from there")
                raise Stopped(stop_requested.exit_code)
    return run.finish()


@dataclass(frozen=True)
class QueuedStep:
    """An optimizer step that the device may still be at."""

    step: int
    loss_and_norm: Numbers
    lr: float
    tokens: int
    epoch: int


class Run:
    """One training run: everything is loaded, checked and, where its folder has a checkpoint, resumed on creation.

    The cheap checks come first: nothing long starts before the tokenizer, the data and the folder are known to do.

    Attributes:
        ahead: steps that are queued on the device before the host reads what the one before came to.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None]):
        self.config = config
        self.device = join_ranks(pick_device(config.train.device))
        self.together = Together()
        self.mesh = build_mesh(config, self.device)
        self.say = say if self.together.leads else _silent
        loop = config.train
        self.checkpoints = TrainingCheckpoints(config.output_dir / "checkpoints", loop.keep_last, loop.async_save)
        resumed = self.checkpoints.latest()
        check_format(resumed)
        check_same_run(config, resumed)
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
        parts = build_parts(config, resumed, self.device, self.mesh)
        self.parts = list(parts.values())
        self.model = self.parts[0]
        check_lengths(self._longest, self.model.config)
        let_lengths_recur(self.model, self.stream, config, self._longest)
        for part in self.parts if config.data.packing else ():
            check_packing(part, self.device, self.mesh)
        torch.manual_seed(self._dropout_seed())
        self.trained = self.model if self.mesh.pp == 1 else build_pipeline(parts, config, self.mesh)
        self.optimizer = build_optimizer(self.trained, config.optim, config.train.seed, self.mesh)
        self.done, self._validated_at, self.loss = 0, 0, float("nan")
        self.val_loss: float | None = None
        if resumed:
            self._resume(resumed)
        self.say(_description(self.parts, config, self.device, self.mesh, self.total_steps))
        self.say(in_one_line(served(self.model, config.model, config.data.packing)))
        self.metrics: MetricsLog | None = None
        if self.together.leads:
            self._open_folder()
        self.ahead = 1 if self.device.type == "cuda" else 0
        self._queue: deque[QueuedStep] = deque()
        self._started = self._clock = time.perf_counter()
        self._tokens = 0

    def is_due(self, step: int, every: int) -> bool:
        """Whether what happens ``every`` so many steps, and at the end, happens at ``step``."""
        return step == self.total_steps or step % every == 0

    def step(self, step: int) -> None:
        """Queue one optimizer step; `rows` tells what it came to."""
        if not self._queue:  # the device has nothing to do
            self._clock = time.perf_counter()
        mark("data", step)
        micro_batches = next(self.stream)
        mark("forward/backward")
        lr = self.config.optim.lr_at(step - 1, self.total_steps)
        loss, norm = train_step(self.trained, self.optimizer, micro_batches, lr, self.device, self.mesh)
        tokens = sum(batch["input_ids"].numel() for batch in micro_batches)
        tokens = int(self.together.sum(tokens)) // self.mesh.sharers
        self._tokens += tokens
        self._queue.append(QueuedStep(step, Numbers(loss, norm), lr, tokens, self.stream.epoch))

    def check_replicas(self, step: int) -> None:
        """In the first steps, and now and then.

        Raises:
            TrainingError: ranks that have copies of a parameter have unlike ones; it is named.
        """
        every = self.config.train.check_replicas_every
        if self.mesh.size == 1 or every is None or (step > self.done + 3 and step % every):
            return
        shared = self.trained.shared if isinstance(self.trained, Pipeline) else None
        unlike = diverged(self.optimizer.parameters, self.mesh, shared)
        if self.together.any(bool(unlike)):
            names = ", ".join(f"{name} (along {axes})" for name, axes in list(unlike.items())[:8])
            raise TrainingError(
                f"step {step}: ranks no longer hold the same {names or 'parameters (another rank says which)'}. That "
                "is a defect of the library or of a machine. Checkpoints of earlier steps are as they were: go on "
                "from the last one, and please report it"
            )

    def rows(self, until: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Steps queued, up to ``until``, each with its row for the metrics; waits until the device is through with it.

        Raises:
            TrainingError: loss or gradients are not finite; the weights are as they were before the step.
        """
        while self._queue and self._queue[0].step <= until:
            one = self._queue.popleft()
            self.loss, norm = one.loss_and_norm.read()
            if not math.isfinite(norm):
                raise TrainingError(
                    f"step {one.step}: the loss is {self.loss:.4g} and the gradients' norm is {norm}. Nothing was "
                    "updated in this step, and checkpoints of earlier steps are intact. Lower optim.lr, or look at "
                    "this step's data"
                )
            before, self._clock = self._clock, time.perf_counter()
            yield (
                one.step,
                {
                    "loss": self.loss,
                    "lr": one.lr,
                    "grad_norm": norm,
                    "tokens_per_second": one.tokens / (self._clock - before),
                    "memory_gb": peak_memory_gb(self.device),
                    "epoch": one.epoch,
                },
            )

    def validate(self, step: int) -> float:
        """Loss per valid token over the validation data, after ``step``."""
        assert self.validation is not None
        self._validated_at = step
        self.val_loss = loss = evaluate(self.trained, self.validation, self.device, self.mesh)
        return loss

    def save(self, step: int) -> None:
        """A checkpoint that the same command resumes from, on any number of ranks."""
        mark("checkpoint")
        self.checkpoints.save(
            step,
            tensors=self._tensors() | random_state(self.device),
            state={
                "format": FORMAT,
                "stream": self.stream.state_dict(),
                "loss": self.loss,
                "val_loss": self.val_loss,
                "mesh": str(self.mesh),
                "device": self.device.type,
                "dtype": str(self.model.dtype),
                "config": identity(self.config),
            },
            write_files=lambda folder: save_description(self.model, self.tokenizer, folder / "hf"),
            metric=self.val_loss if self._validated_at == step else None,
        )

    def finish(self) -> Summary:
        """Draw the loss curve and export: ``hf/``, and with LoRA ``adapter/`` too, folded into ``hf/``."""
        mark("export")
        seconds, folder = time.perf_counter() - self._started, self.config.output_dir
        self.checkpoints.wait()
        if self.metrics:
            self.metrics.close()
            plot_loss(self.metrics.path, folder / "loss.png")
        hf, adapter = self.export()
        speed = self._tokens / seconds
        return Summary(self.total_steps, self.loss, self.val_loss, hf, adapter, seconds, speed)

    def export(self) -> tuple[Path, Path | None]:
        """Write the weights that were saved last; the model may be merged then, and is not trained further."""
        lora = self.config.lora
        if self.mesh.pp == 1 and (lora is None or lora.base_dtype == "auto"):
            return export_trained(self.model, self.tokenizer, self.config)
        # no rank has all weights, or those that were rounded to float8
        return export_from(self.checkpoints.latest(), self.tokenizer, self.config, self.model.dtype)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What is trained, and the optimizer's state: to be saved, or filled in place."""
        # without LoRA buffers too, and what is frozen: the whole model comes back from here
        whole = {saved_name(part, name): t for part in reversed(self.parts) for name, t in untied(part)}
        weights = whole if self.config.lora is None else self.optimizer.parameters
        seen = {name: tensor for part in self.parts for name, tensor in float8_state(part).items()}
        return {f"model.{name}": tensor for name, tensor in weights.items()} | self.optimizer.state_tensors() | seen

    def _open_folder(self) -> None:
        folder = self.config.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(self.config))
        audits = {name: asdict(audit) for name, audit in self._audits.items()}
        (folder / "data_audit.json").write_text(json.dumps(audits, indent=2) + "\n")
        self.metrics = MetricsLog(folder, resume_step=self.done)

    def _resume(self, checkpoint: TrainingCheckpoint) -> None:
        if (before := checkpoint.state["dtype"]) != str(self.model.dtype):
            raise CheckpointError(
                f"{checkpoint.folder} was trained in {before}, and here model.dtype={self.config.model.dtype!r} means "
                f"{self.model.dtype}, which would drop its fp32 masters; set model.dtype to what it was"
            )
        checkpoint.load(self._tensors())
        self.stream.load_state_dict(checkpoint.state["stream"])
        self.done, self.loss, self.val_loss = checkpoint.step, checkpoint.state["loss"], checkpoint.state["val_loss"]
        if (checkpoint.state["mesh"], checkpoint.state["device"]) == (str(self.mesh), self.device.type):
            states = random_state(self.device)
            checkpoint.load(states)
            restore_random_state(states, self.device)
        else:  # no rank has a generator to go on with: a new one, of its own
            torch.manual_seed(self._dropout_seed() + self.mesh.pp * self.mesh.averaged * self.done)
        self.say(f"resuming after step {checkpoint.step} from {checkpoint.folder}")

    def _dropout_seed(self) -> int:
        """Ranks with other tokens or layers drop others; those that compute the same ones together drop the same."""
        mesh, place = self.mesh, self.mesh.place
        return self.config.train.seed + (place["pp"] * mesh.data + mesh.data_rank) * mesh.cp + place["cp"]

    def _stream(self, name: str, source: str, split: str | None) -> BatchStream:
        data, loop = self.config.data, self.config.train
        with blame(f"data.{name}"):
            examples, self._audits[name] = build_dataset(source, split, self.tokenizer, data)
        self._longest = max(self._longest, max(map(examples.length, range(len(examples)))))
        self.say(self._audits[name].summary())
        return BatchStream(
            examples,
            batch_size=loop.batch_size,
            micro_batch_size=loop.micro_batch_size,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            packed_length=data.max_length if data.packing else None,
            shuffle=data.shuffle,
            seed=loop.seed,
            multiple_of=self.mesh.sequence_cut,
            alike=self.mesh.pp > 1,
            rank=self.mesh.data_rank,
            world_size=self.mesh.data,
        )


def _silent(line: str) -> None:
    """What ranks other than the leading one say."""


def _description(
    parts: Sequence["PreTrainedModel"], config: TrainConfig, device: torch.device, mesh: Mesh, total_steps: int
) -> str:
    model, own = parts[0], [parameter for part in parts for parameter in part.parameters()]
    # all ranks of a stage have, or share, the same
    parameters = Together().sum(sum(p.numel() for p in own)) / mesh.stage
    trained = Together().sum(sum(p.numel() for p in own if p.requires_grad)) / mesh.stage
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    ranks = f", {mesh.size} ranks ({mesh})" if mesh.size > 1 else ""
    method = f"LoRA r={config.lora.r}" if config.lora else "all weights"
    return (
        f"{type(model).__module__.split('.')[0]}.{type(model).__name__}: {parameters / 1e6:,.1f} M parameters, "
        f"{trained / 1e6:,.1f} M trained ({method}), {dtype} on {device}{ranks}; "
        f"{total_steps} steps of {config.train.batch_size} rows"
    )
