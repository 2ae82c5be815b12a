"""One optimizer step, and one pass over validation data, by all ranks of a mesh."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nemo_automodel.components.data import BatchStream
from nemo_automodel.components.distributed import ALONE, Mesh
from nemo_automodel.components.loss import next_token_loss, next_token_targets, valid_tokens
from nemo_automodel.components.optim import MasterAdamW
from nemo_automodel.components.together import Together
from nemo_automodel.recipes.transfer import inputs_of
from nemo_automodel.recipes.watchdog import mark


def train_step(
    model: nn.Module,
    optimizer: MasterAdamW,
    micro_batches: Sequence[dict[str, Tensor]],
    lr: float,
    device: torch.device,
    mesh: Mesh = ALONE,
) -> tuple[Tensor, Tensor]:
    """One optimizer step, queued on ``device``: the host does not wait for it.

    Args:
        model: trained in place.
        optimizer: of its trained parameters.
        micro_batches: of this rank, on the CPU, where their valid tokens are counted.
        lr: learning rate.
        device: the model's.
        mesh: of all ranks.

    Returns:
        Scalars: the loss per valid token over all micro-batches of all ranks, and the gradients' norm. If the norm is
        not finite, neither this step nor a later one updates anything.
    """
    together = Together()
    valid = _count(valid_tokens(batch["labels"]) for batch in micro_batches) / mesh.sharers
    optimizer.accumulating = len(micro_batches) > 1
    total = torch.zeros((), device=device)
    for batch in micro_batches:
        loss = _loss(model, batch, device, mesh) / valid
        (loss * mesh.averaged).backward()  # FSDP averages over ranks, each of which has a part of the sum
        total += loss.detach()
    mark("optimizer")
    norm = optimizer.step(lr)
    return together.add(total) / mesh.tp, norm


@torch.no_grad()
def evaluate(model: nn.Module, stream: BatchStream, device: torch.device, mesh: Mesh = ALONE) -> float:
    """Loss per valid token over one pass of the stream, by all ranks."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    valid = 0
    for batch in (batch for micro_batches in stream.one_pass() for batch in micro_batches):
        mark("validation")
        total += _loss(model, batch, device, mesh)
        valid += valid_tokens(batch["labels"])
    model.train()
    together = Together()
    return together.sum(total.item()) / mesh.tp / (together.sum(valid) / mesh.sharers)


def _loss(model: nn.Module, batch: dict[str, Tensor], device: torch.device, mesh: Mesh) -> Any:
    return next_token_loss(model, inputs_of(model, own_part(batch, mesh), device))


def own_part(batch: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """What this rank computes of rows that ``cp`` ranks share: its tokens, and what they predict, the last one too.

    Positions and masks stay whole, from which a model sees where its part, and each document, begins.
    """
    if mesh.cp == 1:
        return batch
    batch = {**batch, "targets": next_token_targets(batch["labels"])}
    del batch["labels"]
    return batch | {name: mesh.part(batch[name]) for name in ("input_ids", "targets")}


def _count(numbers: Any) -> float:
    """Of all ranks together."""
    return Together().sum(sum(numbers))
