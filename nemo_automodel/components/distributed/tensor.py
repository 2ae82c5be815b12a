"""Tensor parallelism: a model's plan, module name -> style, carried out by torch's DTensors."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module


class NormOfHeads(ParallelStyle):
    """A norm of ``[B, S, heads, D]`` or ``[B, S, heads * D]``, of which each rank has some heads: its weight is whole.

    Without it a rank's gradient would be that of its own heads, and a mean over all heads that over its own.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        heads = (Shard(2),)

        def joined(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> DTensor:
            x = DTensor.from_local(inputs[0], mesh, heads, run_check=False)
            # the norm of all heads together needs them together: torch would add epsilon to a mean still in parts
            return x if x.ndim > 3 else x.redistribute(placements=(Replicate(),))

        def own(_: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return output.redistribute(placements=heads).to_local()

        # torch annotates both with None, and uses what they return
        return distribute_module(module, device_mesh, input_fn=joined, output_fn=own)  # type: ignore[arg-type]


STYLES: Mapping[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "replicated_with_grad_allreduce": NormOfHeads,
}
"""What a plan may ask of a module, in transformers' words; ``_rep``: its output, or input, is whole on every rank."""


def parallelize_tensors(model: nn.Module, plan: Mapping[str, str], mesh: DeviceMesh) -> None:
    """Cut the modules that ``plan`` names over the ranks of ``mesh``; all others are whole on every rank.

    An embedding whose weight is that of a module in the plan (a tied head) is cut by the rows of its vocabulary, so
    that the two stay one parameter.

    Args:
        model: on the meta device, or whole on every rank; not sharded yet.
        plan: module name, with ``*`` for a layer's number, -> the name of a style.
        mesh: of one axis.

    Raises:
        ValueError: an entry that matches no module, or a style that is none; nothing is changed then.
    """
    styles: dict[str, str] = {}
    problems = []
    modules = dict(model.named_modules())
    for pattern, style in plan.items():
        matching = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        found = [name for name in modules if matching.fullmatch(name)]
        if not found:
            problems.append(f"{pattern}: matches no module")
        if style not in STYLES:
            problems.append(f"{pattern}: {style!r} is no style; there are {', '.join(STYLES)}")
        styles.update(dict.fromkeys(found, style))
    if problems:
        raise ValueError(
            f"the tensor-parallel plan of {type(model).__name__} does not fit it:\n  " + "\n  ".join(problems)
        )

    ties = [
        (head, name)
        for name, module in modules.items()
        for head in styles
        if isinstance(module, nn.Embedding) and module.weight is getattr(modules[head], "weight", None)
    ]
    styles.update((embedding, "rowwise_rep") for _, embedding in ties)
    parallelize_module(model, mesh, {name: STYLES[style]() for name, style in styles.items()})
    for head, embedding in ties:
        modules[head].weight = modules[embedding].weight
