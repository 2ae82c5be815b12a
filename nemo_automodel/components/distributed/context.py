"""Context parallelism: the ranks of a group have the same rows, and each computes a part of every sequence.

Between the attentions of a model each token is by itself, so only attention needs the others. Positions, masks and
documents' bounds are whole on every rank: a model knows them without asking others, and takes its part itself.
Shapes: B batch, S sequence, s its part (S / ranks), H query heads, K key/value heads, D head_dim.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from nemo_automodel.components.distributed.mesh import Mesh
from nemo_automodel.components.distributed.ring import ring_attention, ring_gap


class NotShared(ValueError):
    """A model that cannot compute parts of sequences, or not in the way that is asked for; the message names it."""


class SharedSequence:
    """Sequences that this rank has a part of, of each the same.

    Args:
        mesh: of all ranks.
        group: those that share a sequence, in the order of its parts.
    """

    def __init__(self, mesh: Mesh, group: dist.ProcessGroup):
        self._mesh, self.ranks, self.group = mesh, mesh.cp, group

    def part(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of something whole, along ``dim``."""
        return self._mesh.part(x, dim)

    def whole_shape(self, x: Tensor) -> Tensor:
        """Nothing, of the device, dtype, batch and whole length that the part ``x`` ``[B, s, ...]`` belongs to."""
        return x.new_empty(x.shape[0], x.shape[1] * self.ranks, 0)


class AllToAll(SharedSequence):
    """Attention to a whole sequence by each rank, for its part of the heads (Ulysses, arXiv:2309.14509).

    So it serves every implementation of attention, and whatever masks, windows or documents that knows.
    """

    def attend(
        self, attention: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        """``[B, s, H, D]``: what ``attention`` gives for this rank's part, and its weights for this rank's heads.

        Args:
            attention: of transformers' interface.
            module: for it.
            query: ``[B, H, s, D]``; the number of ranks divides H and K.
            key: ``[B, K, s, D]``.
            value: ``[B, K, s, D]``.
            *args: for ``attention``, a mask of whole sequences.
            **options: for ``attention``.
        """
        heads = [x.shape[1] // self.ranks for x in (query, key, value)]
        # [ranks, B, heads, s, D]: all three in one message
        sent = torch.cat([x.unflatten(1, (self.ranks, -1)).movedim(1, 0) for x in (query, key, value)], dim=2)
        # the first axis is now the part of the sequence: [B, heads, S, D]
        received = self._exchange(sent).movedim(0, 2).flatten(2, 3)
        output, weights = attention(module, *received.split(heads, dim=1), *args, **options)
        parts = self._exchange(output.unflatten(1, (self.ranks, -1)).movedim(1, 0).contiguous())
        return parts.movedim(0, 2).flatten(2, 3), weights

    def _exchange(self, x: Tensor) -> Tensor:
        """``x[i]`` to rank ``i``, and what rank ``i`` sent at ``[i]``; gradients go the other way."""
        return all_to_all_single_autograd(x.flatten(0, 1), None, None, self.group).view(x.shape)


class Ring(SharedSequence):
    """Attention to one part after the other, that go round: any number of heads, causal attention and nothing else.

    Each rank has a piece from the front of the sequence and one from the back, so that all have as much to do.
    """

    @torch.compiler.disable  # the rounds are torch's own, in Python
    def attend(
        self,
        attention: Any,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """``[B, s, H, D]``, instead of what ``attention``, causal sdpa, would give.

        Raises:
            NotShared: it would not be the same.
        """
        _refuse_ring({
            "masks (of packed documents, windows, padding on the left)": attention_mask is not None,
            f"dropout of attention weights ({dropout})": dropout > 0,
            f"softcap on the scores ({softcap})": softcap is not None,
        })  # fmt: skip
        if (gap := ring_gap(query)) is not None:
            _refuse_ring({gap: True})
        return ring_attention(query, key, value, scaling, self.group).transpose(1, 2), None


def _refuse_ring(lacks: dict[str, bool]) -> None:
    for what, there in lacks.items():
        if there:
            raise NotShared(f"mesh.cp_method=ring has no {what}: set mesh.cp_method=all_to_all")


def parallelize_context(model: nn.Module, mesh: Mesh) -> None:
    """Tell every module that declares a ``context`` how ranks of ``mesh`` share sequences.

    The model then takes this rank's part of ``input_ids``, and whole ``position_ids`` and masks.

    Raises:
        NotShared: layers of the model have no module that declares one; or its attention is none that goes in a ring.
    """
    if (group := mesh.cp_group) is None:
        return
    check_shares_sequences(model)
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    ring = mesh.cp_method == "ring"
    if ring:
        _refuse_ring({f"attention {implementation!r}, only 'sdpa'": implementation != "sdpa"})
    context = Ring(mesh, group) if ring else AllToAll(mesh, group)
    for module in filter(_declares, model.modules()):
        module.context = context  # type: ignore[assignment]


def check_shares_sequences(model: nn.Module) -> None:
    """Refuse a model that would take a part of a sequence for the whole.

    Raises:
        NotShared: its backbone declares no ``context``, or layers have no module that does.
    """
    if (module := _lacking(model)) is not None:
        raise NotShared(
            f"{type(model).__name__}: {type(module).__name__} does not declare that it computes "
            "parts of sequences (an attribute 'context'), as the library's own families do: set mesh.cp=1"
        )


def shares_sequences(model: nn.Module) -> bool:
    """Whether `check_shares_sequences` lets it pass: its attention takes no length from the states that it is given."""
    return _lacking(model) is None


def _lacking(model: nn.Module) -> nn.Module | None:
    """The first module that would have to declare a ``context``, or hold one that does, and has none."""
    backbone: Any = getattr(model, "base_model", model)
    layers = [module for module in model.modules() if type(module).__name__ in set(model._no_split_modules)]  # type: ignore[arg-type]
    lacking = [module for module in (backbone, *layers) if not any(map(_declares, module.modules()))]
    return next(iter(lacking), None if _declares(backbone) else backbone)


def _declares(module: nn.Module) -> bool:
    return hasattr(module, "context")
