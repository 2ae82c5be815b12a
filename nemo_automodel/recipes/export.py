"""From trained weights to what others read: plain Hugging Face folders, and adapters in peft's format."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM
from nemo_automodel.components.checkpoint import CheckpointError, TrainingCheckpoints, publish_folder
from nemo_automodel.components.checkpoint.loading import assign
from nemo_automodel.components.checkpoint.training_state import TrainingCheckpoint
from nemo_automodel.components.models.common.hf_checkpointing_mixin import HFCheckpointingMixin
from nemo_automodel.components.models.common.pretrained import write_configs
from nemo_automodel.components.peft import LoRAConfig, apply_lora, layout_of, merge_lora, save_adapter
from nemo_automodel.components.placement import whole
from nemo_automodel.components.together import Together

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nemo_automodel.recipes.train import TrainConfig

_GROUP_BYTES = 2**30


def save_description(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write all of a Hugging Face folder but its weights: configs, tokenizer, chat template."""
    write_configs(model, folder)
    tokenizer.save_pretrained(folder)


def export_trained(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", config: "TrainConfig"
) -> tuple[Path, Path | None]:
    """Write ``hf/``, and with LoRA ``adapter/`` too, folded into ``hf/``; all ranks call this. The model is merged.

    Returns:
        The folders; None without LoRA.
    """
    together, adapter = Together(), None
    if config.lora is not None:

        def write_adapter(folder: Path) -> None:
            save_adapter(model, folder, config.lora, config.model.path, writes=together.leads)

        adapter = publish_folder(config.output_dir / "adapter", write_adapter, together=together)
        merge_lora(model)
    return _publish_model(model, tokenizer, config.output_dir / "hf", together), adapter


def export_from(
    checkpoint: TrainingCheckpoint | None,
    tokenizer: "PreTrainedTokenizerBase",
    config: "TrainConfig",
    dtype: torch.dtype,
) -> tuple[Path, Path | None]:
    """The same from a checkpoint, by the leading rank, while the others wait: where none has the model's own weights.

    Args:
        checkpoint: the run's last.
        tokenizer: goes beside the model.
        config: the run's.
        dtype: of the trained model.
    """
    hf, adapter = config.output_dir / "hf", config.output_dir / "adapter" if config.lora is not None else None

    def work() -> None:
        assert checkpoint is not None
        _publish_checkpoint(checkpoint, adapter or hf)
        if adapter is not None:
            model = NeMoAutoModelForCausalLM.from_pretrained(config.model.path, adapter=adapter, dtype=dtype)
            merge_lora(model)
            _publish_model(model, tokenizer, hf, Together(alone=True))

    Together().run(work, everywhere=False)
    return hf, adapter


def _publish_model(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", hf: Path, together: Together
) -> Path:
    def write(folder: Path) -> None:
        if isinstance(model, HFCheckpointingMixin):
            model.write_checkpoint(folder, untied(model), together=together)
        else:  # transformers' own class: gathered whole, for the leading rank to write
            state = {
                name: whole(tensor).cpu() if isinstance(tensor, DTensor) else tensor
                for name, tensor in model.state_dict().items()
            }
            if together.leads:
                model.save_pretrained(folder, state_dict=state)
        if together.leads:
            tokenizer.save_pretrained(folder)

    return publish_folder(hf, write, together=together)


def export_checkpoint(path: Path, out: Path) -> Path:
    """Turn a training checkpoint, as the ranks wrote it, into a Hugging Face folder, or (LoRA) a peft adapter.

    Weights are read and written about a gigabyte at a time.

    Args:
        path: a ``step-...`` folder, or a run's folder or its ``checkpoints/`` for the newest one.
        out: the folder to write; there must be nothing yet.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
        FileExistsError: ``out`` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already; choose another folder")
    return _publish_checkpoint(_find(path), out)


def _publish_checkpoint(checkpoint: TrainingCheckpoint, out: Path) -> Path:
    described = checkpoint.folder / "hf"
    lora = checkpoint.state["config"]["lora"]
    model = NeMoAutoModelForCausalLM.from_config(described, device="meta")
    if lora is not None:
        config = LoRAConfig(**lora)
        apply_lora(model, config, layout_of(model))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, tensor in _stored(checkpoint, trained):
            assign(model, name, tensor)
        base = checkpoint.state["config"]["model"]["path"]
        return publish_folder(out, lambda folder: save_adapter(model, folder, config, base))

    def write(folder: Path) -> None:
        if isinstance(model, HFCheckpointingMixin):
            model.write_checkpoint(folder, _stored(checkpoint, dict(untied(model))))
        else:
            for name, tensor in _stored(checkpoint, dict(untied(model))):
                assign(model, name, tensor)
            model.tie_weights()
            model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(described).save_pretrained(folder)

    return publish_folder(out, write)


def _find(path: Path) -> TrainingCheckpoint:
    found = (
        TrainingCheckpoints(path / "checkpoints").latest()
        or TrainingCheckpoints(path).latest()
        or TrainingCheckpoints(path.parent).find(path.name)
    )
    if found is not None:
        return found
    raise CheckpointError(f"{path} holds no training checkpoint: give a step-... folder, or the folder of a run")


def _stored(checkpoint: TrainingCheckpoint, like: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's values of the parameters ``like``, which may be on meta; a group of them at a time."""
    group: dict[str, Tensor] = {}
    for name, parameter in like.items():
        group[name] = torch.empty_like(parameter, device="cpu", requires_grad=False)
        if sum(tensor.nbytes for tensor in group.values()) > _GROUP_BYTES or name == list(like)[-1]:
            checkpoint.load({f"model.{name}": tensor for name, tensor in group.items()}, alone=True)
            yield from group.items()
            group = {}


def untied(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters under one name each: a tied head is not written."""
    # state_dict, not parameters: FSDP gives the shards there, whatever was gathered last
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()
