"""Cross entropy of the next token, as a sum over valid tokens, so that any split of the data adds up."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nemo_automodel.components.kernels.linear_cross_entropy import IGNORE
from nemo_automodel.components.placement import sent

DENSE = 0.75
"""Share of the positions from which on picking those that count costs more than it spares."""


def next_token_targets(labels: Tensor) -> Tensor:
    """``labels`` ``[batch, seq]`` moved one to the left: what each position is to predict."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def valid_tokens(labels: Tensor) -> int:
    """How many tokens of ``labels`` ``[batch, seq]`` the loss counts (a row's first token is never predicted)."""
    return int((labels[:, 1:] != IGNORE).sum())


def next_token_loss(model: Callable[..., Any], batch: Mapping[str, Any]) -> Tensor:
    """Sum of the cross entropies of the valid tokens, in fp32.

    Only positions where some row has something to predict are given to the head: the prompts' logits, often most of
    them, are never computed.

    Args:
        model: called with the batch less its labels, and ``logits_to_keep`` where few positions count. One that
            ``takes_targets`` gives the loss, any other its logits.
        batch: ``input_ids``, ``labels`` ``[batch, seq]`` (or ``targets``, of a part of a sequence, whose labels would
            lack the next part's first) and whatever else the model takes. Labels on the CPU spare the host from waiting
            for a GPU.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "targets")}
    device = batch["input_ids"].device
    targets = batch["targets"] if "targets" in batch else next_token_targets(batch["labels"])
    positions = (targets != IGNORE).any(dim=0).nonzero().squeeze(1)
    if len(positions) < DENSE * targets.shape[1]:
        targets = targets[:, positions]
        inputs["logits_to_keep"] = sent(positions, device)
    targets = sent(targets, device)
    if getattr(model, "takes_targets", False):
        loss: Tensor = model(**inputs, targets=targets, use_cache=False).loss
        return loss
    logits = model(**inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
