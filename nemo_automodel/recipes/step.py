"""One optimizer step, and one pass over validation data, by all ranks of a mesh."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nemo_automodel.components.data import BatchStream
from nemo_automodel.components.distributed import ALONE, Mesh, Pipeline
from nemo_automodel.components.elsewhere import Elsewhere
from nemo_automodel.components.loss import next_token_loss, next_token_targets, valid_tokens
from nemo_automodel.components.optim import MasterAdamW
from nemo_automodel.components.together import Together
from nemo_automodel.recipes.transfer import inputs_of
from nemo_automodel.recipes.watchdog import mark


def train_step(
    model: nn.Module | Pipeline,
    optimizer: MasterAdamW,
    micro_batches: Sequence[dict[str, Tensor]],
    lr: float,
    device: torch.device,
    mesh: Mesh = ALONE,
) -> tuple[Tensor, Tensor]:
    """One optimizer step, queued on ``device``: the host does not wait for it.

    Args:
        model: trained in place; the pipeline where ranks have stages of it.
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
    valid = together.sum(sum(valid_tokens(batch["labels"]) for batch in micro_batches)) / mesh.sharers
    optimizer.accumulating = len(micro_batches) > 1
    # FSDP averages over ranks, each of which has a part of the sum
    if isinstance(model, Pipeline):
        inputs = [_inputs(model.parts[0], batch, device, mesh) for batch in micro_batches]
        total = model.train_step(inputs, mesh.averaged / valid) / mesh.averaged
    else:
        total = torch.zeros((), device=device)
        for batch in micro_batches:
            total += _backward(model, _inputs(model, batch, device, mesh), valid, mesh)
    mark("optimizer")
    norm = optimizer.step(lr)
    return together.add(total) / mesh.tp, norm


@torch.no_grad()
def evaluate(model: nn.Module | Pipeline, stream: BatchStream, device: torch.device, mesh: Mesh = ALONE) -> float:
    """Loss per valid token over one pass of the stream, by all ranks."""
    parts = model.parts if isinstance(model, Pipeline) else [model]
    for part in parts:
        part.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    valid = 0
    for micro_batches in stream.one_pass():
        mark("validation")
        inputs = [_inputs(parts[0], batch, device, mesh) for batch in micro_batches]
        if isinstance(model, Pipeline):
            total += model.evaluate(inputs)
        else:
            total += sum(next_token_loss(model, each) for each in inputs)
        valid += sum(valid_tokens(batch["labels"]) for batch in micro_batches)
    for part in parts:
        part.train()
    together = Together()
    return together.sum(total.item()) / mesh.tp / (together.sum(valid) / mesh.sharers)


def compute_stage(part: Any, batch: Mapping[str, Any]) -> Tensor:
    """What a pipeline's stage makes of a micro-batch: hidden states, or, if it has the head, the sum of the losses."""
    if not isinstance(part.get_output_embeddings(), Elsewhere):
        return next_token_loss(part, batch)
    hidden: Tensor = part(**{n: v for n, v in batch.items() if n not in ("labels", "targets")}, use_cache=False).logits
    return hidden


def _backward(model: nn.Module, inputs: Mapping[str, Any], valid: float, mesh: Mesh) -> Tensor:
    """The loss of a micro-batch, of which autograd holds nothing afterwards: beside it no CUDA graph could be made."""
    loss = next_token_loss(model, inputs) / valid
    (loss * mesh.averaged).backward()
    return loss.detach()


def _inputs(model: nn.Module, batch: dict[str, Tensor], device: torch.device, mesh: Mesh) -> dict[str, Any]:
    return inputs_of(model, own_part(batch, mesh), device)


def own_part(batch: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """What this rank computes of rows that ``cp`` ranks share: its tokens, and what they predict, the last one too.

    Positions and masks stay whole, from which a model sees where its part, and each document, begins.
    """
    if mesh.cp == 1:
        return batch
    batch = {**batch, "targets": next_token_targets(batch["labels"])}
    del batch["labels"]
    return batch | {name: mesh.part(batch[name]) for name in ("input_ids", "targets")}
