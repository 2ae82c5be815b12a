"""Context parallelism: the ranks of a group have the same rows, and each computes a part of every sequence.

Between the attentions of a model each token is by itself, so only attention needs the others. Positions, masks and
documents' bounds are whole on every rank: a model knows them without asking others, and takes its part itself.
Shapes: B batch, S sequence, s its part (S / ranks), H query heads, K key/value heads, D head_dim.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from nemo_automodel.components.distributed.mesh import Mesh


class NotShared(ValueError):
    """A model that does not know what to do with a part of a sequence; the message names it."""


class AllToAll:
    """Attention to a whole sequence by each rank, for its part of the heads (Ulysses, arXiv:2309.14509).

    So it serves every implementation of attention, and whatever masks, windows or documents it knows.

    Args:
        group: the ranks, in the order of their parts.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group, self.ranks, self._rank = group, group.size(), group.rank()

    def part(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of something whole, along ``dim``."""
        return part_of(x, self._rank, self.ranks, dim)

    def whole_shape(self, x: Tensor) -> Tensor:
        """Nothing, of the device, dtype, batch and whole length that the part ``x`` ``[B, s, ...]`` belongs to."""
        return x.new_empty(x.shape[0], x.shape[1] * self.ranks, 0)

    def attend(
        self, attention: Callable[..., tuple[Tensor, Any]], query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, Any]:
        """What ``attention`` gives for this rank's part of the sequence, and its weights for this rank's heads.

        Args:
            attention: of ``[B, heads, S, D]``, given the options as they are, gives ``[B, S, heads, D]`` and weights.
            query: ``[B, H, s, D]``; the number of ranks divides H and K.
            key: ``[B, K, s, D]``.
            value: ``[B, K, s, D]``.
            **options: for ``attention``; what of them has a sequence has the whole one.
        """
        heads = [x.shape[1] // self.ranks for x in (query, key, value)]
        # [ranks, B, heads, s, D]: all three in one message
        sent = torch.cat([x.unflatten(1, (self.ranks, -1)).movedim(1, 0) for x in (query, key, value)], dim=2)
        # [B, heads, ranks, s, D]: the first axis is now the part of the sequence
        received = self._exchange(sent).movedim(0, 2).flatten(2, 3)
        output, weights = attention(*received.split(heads, dim=1), **options)
        parts = self._exchange(output.unflatten(1, (self.ranks, -1)).movedim(1, 0).contiguous())
        return parts.movedim(0, 2).flatten(2, 3), weights

    def _exchange(self, x: Tensor) -> Tensor:
        """``x[i]`` to rank ``i``, and what rank ``i`` sent at ``[i]``; gradients go the other way."""
        return all_to_all_single_autograd(x.flatten(0, 1), None, None, self._group).view(x.shape)


def part_of(x: Tensor, rank: int, ranks: int, dim: int = 1) -> Tensor:
    """What ``rank`` of ``ranks`` has of ``x``, which is whole, along ``dim``.

    Raises:
        ValueError: the ranks do not divide it.
    """
    if x.shape[dim] % ranks:
        raise ValueError(
            f"{ranks} context-parallel ranks cannot share a sequence of {x.shape[dim]} tokens: pad it to a multiple of "
            f"{ranks}"
        )
    return x.chunk(ranks, dim)[rank]


def parallelize_context(model: nn.Module, mesh: Mesh) -> None:
    """Tell every module that declares a ``context`` how ranks of ``mesh`` share sequences.

    The model then takes this rank's part of ``input_ids``, and whole ``position_ids`` and masks.

    Raises:
        NotShared: layers of the model have no module that declares one.
    """
    if (group := mesh.cp_group) is None:
        return
    check_shares_sequences(model)
    context = AllToAll(group)
    for module in filter(_declares, model.modules()):
        module.context = context  # type: ignore[assignment]


def check_shares_sequences(model: nn.Module) -> None:
    """Refuse a model that would take a part of a sequence for the whole.

    Raises:
        NotShared: its backbone declares no ``context``, or layers have no module that does.
    """
    backbone: Any = getattr(model, "base_model", model)
    layers = [module for module in model.modules() if type(module).__name__ in set(model._no_split_modules)]  # type: ignore[arg-type]
    lacking = [module for module in (backbone, *layers) if not any(map(_declares, module.modules()))]
    if lacking or not _declares(backbone):
        raise NotShared(
            f"{type(model).__name__}: {type((lacking or [backbone])[0]).__name__} does not declare that it computes "
            "parts of sequences (an attribute 'context'), as the library's own families do: set mesh.cp=1"
        )


def _declares(module: nn.Module) -> bool:
    return hasattr(module, "context")
