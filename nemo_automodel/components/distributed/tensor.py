"""Tensor and sequence parallelism: a model's plan, module name -> style, carried out with torch's DTensors.

Parameters are DTensors, for whoever loads, saves and updates them. Modules compute on plain tensors: on the rank's
shards of the parameters and of their input, so that kernels and adapters serve shards as they serve whole layers.
"""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel, parallelize_module
from torch.func import functional_call

from nemo_automodel.components.distributed.draws import draw_own, draws_of, drops, is_dropout, own_draws
from nemo_automodel.components.distributed.moves import CHANNELS, COLUMNS, ROWS, SEQUENCE, TERM, WHOLE, moved
from nemo_automodel.components.elsewhere import Elsewhere


@dataclass(eq=False)
class NormOfHeads(ParallelStyle):
    """A norm of ``[B, S, heads, D]`` or ``[B, S, heads * D]``, of which each rank has some heads: its weight is whole.

    Without it a rank's gradient would be that of its own heads, and a mean over all heads that over its own.

    Attributes:
        sums: see `Local`.
    """

    sums: bool = False

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        plain = _taken_apart(module, device_mesh, {})

        def forward(itself: nn.Module, x: Tensor) -> Tensor:
            parameters = {name: _local(parameter, self.sums) for name, parameter in itself.named_parameters()}
            if x.ndim > 3:  # of each head by itself
                return functional_call(plain, parameters, (x,))  # type: ignore[no-any-return]
            every = moved(x, device_mesh, CHANNELS, WHOLE, term=True)
            heads: Tensor = functional_call(plain, parameters, (every,))
            return heads.unflatten(-1, (device_mesh.size(), -1))[..., device_mesh.get_local_rank(), :]

        module.forward = MethodType(forward, module)  # type: ignore[method-assign]
        return module


@dataclass(eq=False)
class Local(ParallelStyle):
    """A module that computes on plain tensors, this rank's shards of its parameters and input.

    Attributes:
        cut: first part of a parameter's name -> how it lies over the ranks; others are whole.
        given: how the input lies over the ranks.
        used: how the module uses it.
        made: what it makes of that: terms of a sum, or a part.
        wanted: how the output shall lie over the ranks.
        sums: whether ranks' terms of a whole parameter's gradient are added with every backward pass, in fp32, as FSDP
            wants them; else they stay apart until the optimizer's step.
    """

    cut: Mapping[str, Placement]
    given: Placement
    used: Placement
    made: Placement
    wanted: Placement
    sums: bool = False

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if self.made.is_partial() and hasattr(module, "column_ranks"):
            setattr(module, "column_ranks", device_mesh.get_group())  # noqa: B010  (a declared one, of adapters)
        plain, drawing = _taken_apart(module, device_mesh, self.cut), drops(module)
        if summed := self.made.is_partial():
            plain._parameters["bias"] = None  # to be added once, and not by every rank

        def forward(itself: nn.Module, x: Tensor) -> Tensor:
            x = moved(x, device_mesh, self.given, self.used, term=not self.used.is_shard())
            local = {name: _local(parameter, self.sums) for name, parameter in itself.named_parameters()}
            bias = local.pop("bias", None) if summed else None
            if bias is not None and self.wanted == WHOLE:  # every rank adds it to the same
                bias = itself._parameters["bias"].to_local()  # type: ignore[union-attr]
            plain.training = itself.training
            # what each rank has a part of, each drops by itself; what all have, all drop alike
            with draws_of(device_mesh, self.used.is_shard()) if drawing and itself.training else nullcontext():
                y = functional_call(plain, local, (x,))
            width = getattr(itself, "out_features", None) if self.made == CHANNELS else None
            y = moved(y, device_mesh, self.made, self.wanted, width=width)
            return y if bias is None else y + bias

        module.forward = MethodType(forward, module)  # type: ignore[method-assign]
        return module


class _Vocabulary(RowwiseParallel):
    """An embedding of which each rank has some rows."""

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: Any, outputs: Any, device_mesh: Any
    ) -> Any:
        # waited for: what torch leaves under way gets no gradient from a compiled layer (torch 2.13, AOTAutograd)
        return outputs.redistribute(placements=output_layouts).to_local()


def _taken_apart(module: nn.Module, mesh: DeviceMesh, cut: Mapping[str, Placement]) -> nn.Module:
    """A copy of ``module`` that computes on plain tensors; in the module itself parameters become DTensors."""
    for name, parameter in list(module.named_parameters()):
        owner, leaf = _owner(module, name)
        placement = cut.get(name.partition(".")[0], WHOLE)
        owner._parameters[leaf] = nn.Parameter(
            distribute_tensor(parameter.detach(), mesh, [placement]), requires_grad=parameter.requires_grad
        )
    plain = copy.copy(module)
    plain._parameters = dict.fromkeys(module._parameters)  # given with each call; FSDP will put others into the module
    return plain


def _style(**kinds: Any) -> Callable[[bool], ParallelStyle]:
    def make(sequence: bool) -> ParallelStyle:
        style = Local(**kinds)
        if not sequence:
            return style
        return replace(
            style,
            given=SEQUENCE if style.given == WHOLE else style.given,
            wanted=SEQUENCE if style.wanted == WHOLE else style.wanted,
        )

    return make


_OF_ROWS = {"weight": ROWS, "bias": ROWS, "lora_B": ROWS, "lora_magnitude": ROWS}
_OF_COLUMNS = {"weight": COLUMNS, "lora_A": COLUMNS}

STYLES: Mapping[str, Callable[[bool], ParallelStyle]] = {
    "colwise": _style(cut=_OF_ROWS, given=WHOLE, used=WHOLE, made=CHANNELS, wanted=CHANNELS),
    "rowwise": _style(cut=_OF_COLUMNS, given=CHANNELS, used=CHANNELS, made=TERM, wanted=WHOLE),
    "colwise_rep": _style(cut=_OF_ROWS, given=WHOLE, used=WHOLE, made=CHANNELS, wanted=WHOLE),
    "rowwise_rep": _style(cut=_OF_COLUMNS, given=WHOLE, used=CHANNELS, made=TERM, wanted=WHOLE),
    "embedding_rowwise": lambda _: _Vocabulary(input_layouts=Replicate()),
    "replicated_with_grad_allreduce": lambda _: NormOfHeads(),
}
"""What a plan may ask of a module, in transformers' words; ``_rep``: its output, or input, is whole on every rank.

Called with whether what lies between the layers' products is cut along the sequence."""

_ON_SEQUENCE = Local(cut={}, given=SEQUENCE, used=SEQUENCE, made=SEQUENCE, wanted=SEQUENCE)


def parallelize_tensors(
    model: nn.Module,
    plan: Mapping[str, str],
    mesh: DeviceMesh,
    sequence_of: Collection[str] = (),
    sums: bool = False,
) -> None:
    """Cut the modules that ``plan`` names over the ranks of ``mesh``; all others are whole on every rank.

    An embedding whose weight is that of a module in the plan (a tied head) is cut by the rows of its vocabulary, so
    that the two stay one parameter.

    Args:
        model: on the meta device, or whole on every rank; not sharded yet.
        plan: module name, with ``*`` for a layer's number, -> the name of a style.
        mesh: of one axis.
        sequence_of: class names of layers between whose products each rank has a part of the sequence, so that norms
            and the residual stream are not computed, and kept, by every rank. The sequence's length must be a multiple
            of the ranks.
        sums: whether a whole parameter's gradient is the ranks' sum after every backward pass (FSDP will want it) and
            not only when the optimizer adds up their terms.

    Raises:
        ValueError: an entry that matches no module, a style that is none, or dropout of who knows what; nothing is
            changed then.
    """
    modules = dict(model.named_modules())
    styles = styles_of(model, plan)
    _check_dropout(modules, styles, sequence_of)
    ties = [
        (head, name)
        for name, module in modules.items()
        for head in styles
        if isinstance(module, nn.Embedding) and module.weight is getattr(modules[head], "weight", None)
        if head != name
    ]
    styles.update((embedding, "embedding_rowwise") for _, embedding in ties)
    layers = {name: module for name, module in modules.items() if type(module).__name__ in sequence_of}
    made = {name: STYLES[style](_within(name, layers) is not None) for name, style in styles.items()}
    for name in _others_with_parameters(modules, layers, styles):
        made[name] = _ON_SEQUENCE
    parallelize_module(model, mesh, {name: _summing(style, sums) for name, style in made.items()})
    _draw_own_where_cut(modules.values(), layers.values(), mesh)
    for head, embedding in ties:
        modules[head].weight = modules[embedding].weight
    if layers:
        first, *_, last = [*layers.values(), *layers.values()]
        first.register_forward_pre_hook(partial(_cut_along_sequence, mesh), with_kwargs=True)
        last.register_forward_hook(lambda _, args, output: moved(output, mesh, SEQUENCE, WHOLE))


def _summing(style: ParallelStyle, sums: bool) -> ParallelStyle:
    return replace(style, sums=sums) if isinstance(style, Local | NormOfHeads) else style


def _draw_own_where_cut(modules: Iterable[nn.Module], layers: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Dropout between planned modules: of attention's weights, which are some heads', and of a part of the sequence."""
    for module in modules:
        if _rate(module, "attention_dropout") > 0:
            draw_own(module, mesh)
    for layer in layers:  # not around the whole layer, which may be checkpointed within
        setattr(layer, "residual_draws", partial(own_draws, mesh))  # noqa: B010  (a declared one, of the layer)


def has_dropout(module: nn.Module) -> bool:
    """Whether ``module`` itself, of a layer, without those in it, drops anything while it trains."""
    names = ("attention_dropout", "residual_dropout")
    return is_dropout(module) or any(_rate(module, name) > 0 for name in names)


def _rate(module: nn.Module, name: str) -> float:
    """Of dropout, where the attribute is a number; others have a module of that name, which is looked at by itself."""
    value = getattr(module, name, 0.0)
    return value if isinstance(value, int | float) else 0.0


def _check_dropout(modules: Mapping[str, nn.Module], planned: Collection[str], sequence_of: Collection[str]) -> None:
    for name, module in modules.items():
        unknown = is_dropout(module) and _within(name, planned) is None
        if type(module).__name__ in sequence_of and _rate(module, "residual_dropout") > 0:
            unknown = not hasattr(module, "residual_draws")
        if unknown:
            raise ValueError(
                f"{name} has dropout, and tensor parallelism cannot know whether ranks have parts of what it drops "
                "from: set it to 0, or say so as the library's own layers do (attributes attention_dropout, and "
                "residual_dropout with residual_draws)"
            )


def styles_of(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """Name of each module that the plan speaks of -> its style's.

    Raises:
        ValueError: an entry that matches no module, or a style that is none.
    """
    modules = dict(model.named_modules())
    styles: dict[str, str] = {}
    problems = []
    for pattern, style in plan.items():
        matching = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        found = [name for name in modules if matching.fullmatch(name)]
        if not found:
            problems.append(f"{pattern}: matches no module")
        if style not in STYLES:
            problems.append(f"{pattern}: {style!r} is no style; there are {', '.join(STYLES)}")
        styles.update((name, style) for name in found if not isinstance(modules[name], Elsewhere))
    if problems:
        raise ValueError(
            f"the tensor-parallel plan of {type(model).__name__} does not fit it:\n  " + "\n  ".join(problems)
        )
    return styles


def _within(name: str, paths: Collection[str]) -> str | None:
    """Which of the modules ``paths`` the module ``name`` is in."""
    return next((path for path in paths if name.startswith(f"{path}.")), None)


def _others_with_parameters(
    modules: Mapping[str, nn.Module], layers: Collection[str], planned: Collection[str]
) -> Iterator[str]:
    """Modules in the layers, outside those that are planned, that have parameters themselves: norms."""
    for name, module in modules.items():
        inside = _within(name, layers) is not None and name not in planned and _within(name, planned) is None
        if inside and any(True for _ in module.parameters(recurse=False)):
            yield name


def _cut_along_sequence(mesh: DeviceMesh, layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The arguments of the first layer, hidden states (the first of them) being this rank's part."""
    name = None if args else next(iter(options))
    whole = args[0] if name is None else options[name]
    if (tokens := whole.shape[1]) % mesh.size():
        raise ValueError(
            f"sequence parallelism over {mesh.size()} ranks takes sequences of a multiple of that many tokens, and "
            f"this one has {tokens}; pad it, or set mesh.sequence_parallel=false"
        )
    part = moved(whole, mesh, WHOLE, SEQUENCE)
    return ((part, *args[1:]), options) if name is None else (args, {**options, name: part})


def _local(parameter: Tensor, sums: bool) -> Tensor:
    """This rank's shard. Where that is all of it, the rank's tokens, rows or columns give a term of its gradient.

    Args:
        parameter: a DTensor.
        sums: whether the gradient is the sum, of all ranks, rather than terms of it.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    if not parameter.requires_grad:
        with torch.no_grad():
            return parameter.to_local()
    if not (sums and parameter.placements == (WHOLE,)):
        placements = [TERM if each.is_replicate() else each for each in parameter.placements]
        return parameter.to_local(grad_placements=placements)
    own = parameter.to_local(grad_placements=[WHOLE])
    summed: Tensor = _Summed.apply(own, parameter.device_mesh.get_group().group_name)  # type: ignore[no-untyped-call]
    return summed


class _Summed(torch.autograd.Function):
    """Nothing; the gradient is the sum of the ranks' terms, rounded once. No hook: these do not go into graphs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: str) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *terms: Tensor) -> Any:
        wide = torch.promote_types(terms[0].dtype, torch.float32)
        total = wait_tensor(all_reduce(terms[0].to(wide), "sum", ctx.ranks))
        return total.to(terms[0].dtype), None


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
