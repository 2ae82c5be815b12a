"""What is checked before a training starts, so that nothing long begins in vain and nothing goes wrong in silence."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from nemo_automodel.components.checkpoint import CheckpointError
from nemo_automodel.components.checkpoint.training_state import TrainingCheckpoint
from nemo_automodel.components.distributed import ALONE, Mesh
from nemo_automodel.components.elsewhere import Elsewhere
from nemo_automodel.components.float8_training import is_float8
from nemo_automodel.components.models.common.te.modules import TELinear
from nemo_automodel.components.together import Together

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from nemo_automodel.recipes.train import TrainConfig

# what may differ between a run and its resumption: cadence, place, and how a batch is cut up
_FREE = (
    *("validate_every", "save_every", "async_save", "keep_last", "log_every", "device", "micro_batch_size"),
    "check_replicas_every",
)

FORMAT = 4
"""Of a checkpoint's tensors; 1 (unwritten then) had fp32 masters whole, 2 one tensor of all parameters' step counts, 3
adapters' rows in the order of Hugging Face's files."""


@contextmanager
def blame(key: str) -> Iterator[None]:
    """Put the configuration's key in front of an error in what it names."""
    try:
        yield
    except (ValueError, OSError) as error:
        kind = CheckpointError if isinstance(error, CheckpointError) else ValueError
        raise kind(f"{key}: {error}") from error


def check_same_run(config: "TrainConfig", resumed: TrainingCheckpoint | None) -> None:
    """Refuse a folder that holds another run.

    Raises:
        CheckpointError: its checkpoint has another configuration; the message lists what differs.
        ValueError: it has a trained model but no checkpoint to resume from.
    """
    if resumed is None:
        if (config.output_dir / "hf").exists():
            raise ValueError(
                f"output_dir={config.output_dir} holds a trained model and no checkpoint to resume from; choose "
                "another folder, or move that one away"
            )
        return
    before, now = _flat(resumed.state["config"]), _flat(identity(config))
    changed = [key for key in before | now if before.get(key) != now.get(key)]
    if changed:
        lines = [f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in changed]
        raise CheckpointError(
            f"output_dir={config.output_dir} holds a run with another configuration; set these back to resume it, or "
            f"choose another folder (with model.path={config.output_dir / 'hf'} to train its model further):\n  "
            + "\n  ".join(lines)
        )


def check_format(resumed: TrainingCheckpoint | None) -> None:
    """Refuse a checkpoint whose optimizer state is kept in another way.

    Raises:
        CheckpointError: it is; what to do with it.
    """
    if resumed is not None and (found := resumed.state.get("format", 1)) != FORMAT:
        raise CheckpointError(
            f"{resumed.folder} has format {found}, of another version of this library, and here is format {FORMAT}: "
            "finish that run with the version it began with, or export it (automodel export) and train the result "
            "further in another output_dir"
        )


def identity(config: "TrainConfig") -> dict[str, Any]:
    """What must not change between a run and its resumption, as JSON values."""
    values = json.loads(json.dumps(asdict(config), default=str))
    for name in ("output_dir", "mesh"):
        values.pop(name)
    for name in (*_FREE, "hang_timeout"):
        values["train"].pop(name)
    values["model"].pop("cuda_graphs")
    return values


def check_lengths(longest: int, config: "PreTrainedConfig") -> None:
    """Refuse examples longer than the positions the model is made for.

    Raises:
        ValueError: naming both, and what to change.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"the longest example has {longest} tokens, but the model's max_position_embeddings is {limit}: lower "
            "data.max_length, or raise it in the checkpoint's config.json if the model is to learn longer texts"
        )


@torch.no_grad()
def check_packing(model: "PreTrainedModel", device: torch.device, mesh: Mesh = ALONE) -> None:
    """Try on two toy documents in one row whether the second sees the first.

    Which attention implementations read document borders from ``position_ids`` is not written down anywhere, so it is
    measured on the model itself, its linear layers in the dtype of their weights: where float8 has one scale for all
    tokens, a document's values change how another's are rounded.

    Raises:
        ValueError: it does; packing would train on attention across documents.
    """
    was_training = model.training
    model.eval()
    length = -(-8 // mesh.sequence_cut) * mesh.sequence_cut
    second = torch.arange(length - 4)
    documents = [torch.cat((first, second % 7)) for first in (torch.tensor([3, 4, 5, 6]), torch.tensor([6, 3, 4, 7]))]
    rows = mesh.part(torch.stack(documents)).to(device)
    if isinstance(model.get_input_embeddings(), Elsewhere):  # of a later pipeline stage: any hidden states
        table = torch.randn(8 + length, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        rows = F.embedding(rows, table.to(device, model.dtype))
    positions = torch.cat((torch.arange(4), second))[None].to(device)
    with _without_float8(model):
        one, other = (model(input_ids=row[None], position_ids=positions, use_cache=False).logits for row in rows)
    model.train(was_training)
    of_second = mesh.part(torch.arange(length)[None] >= 4).to(device)
    # a rank may have tokens of the first document only, and the others would wait for one that raises alone
    if Together().any(not torch.equal(one[of_second], other[of_second])):
        raise ValueError(
            f"data.packing=true: with {type(model).__name__} and attention {model.config._attn_implementation!r} "
            "packed documents see each other; set data.packing=false"
        )


def rounds_operands(module: nn.Module) -> bool:
    """Whether it is a linear layer that multiplies in float8, by torchao or Transformer Engine."""
    return is_float8(module) or (isinstance(module, TELinear) and module.float8 is not None)


@contextmanager
def _without_float8(model: nn.Module) -> Iterator[None]:
    """Linear layers whose operands are rounded to float8 multiply as torch's do, uncompiled, as they may be without.

    For the classes: the layers themselves may have a forward of their own, which tensor parallelism gave them.
    """
    own: dict[Any, Any] = {type(layer): type(layer).forward for layer in model.modules() if rounds_operands(layer)}
    for kind in own:
        kind.forward = nn.Linear.forward
    try:
        with torch.compiler.set_stance("force_eager") if own else nullcontext():
            yield
    finally:
        for kind, forward in own.items():
            kind.forward = forward


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
