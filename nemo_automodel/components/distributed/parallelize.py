"""A model over a mesh: every kind of parallelism, in the one order in which they fit together."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from nemo_automodel.components.distributed.context import parallelize_context, shares_sequences
from nemo_automodel.components.distributed.fsdp import fully_shard_layers
from nemo_automodel.components.distributed.mesh import Mesh
from nemo_automodel.components.distributed.stages import keep_stage
from nemo_automodel.components.distributed.tensor import has_dropout, parallelize_tensors

Checkpointing = Literal[False, True, "selective"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `parallelize` does beside cutting the model.

    Attributes:
        tp_plan: module name -> style, for tensor parallelism.
        stage: which part of the model this is, for pipeline parallelism.
        stages: of how many.
        checkpointing: what the backward pass computes again: nothing, whole layers, or all but products and attention.
        compile: compile each layer by itself.
        cpu_offload: keep parameters, gradients and the optimizer's state in host memory.
    """

    tp_plan: Mapping[str, str]
    stage: int = 0
    stages: int = 1
    checkpointing: Checkpointing = False
    compile: bool = False
    cpu_offload: bool = False


def parallelize(model: Any, mesh: Mesh, options: Options) -> None:
    """Make ``model``, with its adapters, this rank's part of one that all ranks of ``mesh`` compute together.

    The order is fixed: a pipeline stage is a smaller model; tensor, sequence and context parallelism change what a
    layer computes; checkpointing and compilation wrap that; FSDP gathers parameters around them all.

    Args:
        model: of transformers' kind, on the meta device or whole on every rank; changed in place.
        mesh: of all ranks.
        options: what else.

    Raises:
        ValueError: a plan does not fit the model, it cannot share sequences, it has no layers to shard by, or too few
            for the stages, or dropout or full checkpointing in layers that are compiled for ``tp``.
    """
    if options.stages > 1:
        keep_stage(model, options.stage, options.stages)
    layer_classes = set(model._no_split_modules)
    if (axis := mesh.axis("tp")) is not None:
        # attention written by hand may take the sequence's length from states of which each rank would have a part
        by_sequence = mesh.sequence_parallel and shares_sequences(model)
        if options.compile:
            _check_compiled(model, mesh.tp, options.checkpointing)
        sums = mesh.axis("dp_replicate", "fsdp") is not None
        parallelize_tensors(model, options.tp_plan, axis, layer_classes if by_sequence else (), sums)
    parallelize_context(model, mesh)
    if options.checkpointing:
        _checkpoint_activations(model, options.checkpointing)
    if options.compile:
        for layer in (module for module in model.modules() if type(module).__name__ in layer_classes):
            layer.compile()
    if (axes := mesh.axis("dp_replicate", "fsdp")) is not None:
        fully_shard_layers(model, layer_classes, axes, cpu_offload=options.cpu_offload)


def _check_compiled(model: Any, tp: int, checkpointing: Checkpointing) -> None:
    """Raise a ValueError for what compiled layers cannot do that ``tp`` ranks share."""
    if checkpointing is True:  # Inductor saves a DeviceMesh for the backward pass and dies of it (torch 2.13)
        raise ValueError(
            f"model.compile=true with mesh.tp={tp} and model.gradient_checkpointing=true is more than torch compiles: "
            "use model.gradient_checkpointing=selective, or leave one of them out"
        )
    if dropping := [name for name, each in model.named_modules() if has_dropout(each)]:
        raise ValueError(
            f"model.compile=true with mesh.tp={tp}: {dropping[0]} has dropout, of which compiled layers would "
            "drop the same on ranks that have other parts; set the dropout to 0, or leave out compile or tp"
        )


KEPT = ("mm", "addmm", "_scaled_mm", "_scaled_dot_product_", "_varlen_attn", "_flex_attention")
"""Beginnings of the names of operations whose output selective checkpointing keeps: the costly ones."""


def _checkpoint_activations(model: Any, how: Checkpointing) -> None:
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_costly)
    # transformers 5.23 renamed it; 5.17 has the old name only
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(options)


def _keep_costly(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operation.name().partition("::")[2]
    # compiled layers within a checkpoint (transformers 5.17) compute into buffers that are used again
    costly = name.startswith(KEPT) and not name.endswith(".out")
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE
