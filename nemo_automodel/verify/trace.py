"""What every module of a model takes and gives in one forward pass, under the checkpoint's names of modules."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nemo_automodel.components.peft import layout_of
from nemo_automodel.verify.names import stored_name


@dataclass(frozen=True)
class Point:
    """A place in the forward pass: a module's input or output (``cos`` and ``sin`` of a RoPE module apart)."""

    module: str
    side: str  # "input", "output", "cos", "sin"

    def __str__(self) -> str:
        return f"{self.module} ({self.side})"


Trace = dict[Point, Tensor]
"""In the order of execution."""


def trace(model: nn.Module, **inputs: Any) -> Trace:
    """Run ``model`` without gradients; a fused projection's output is given as that of its parts."""
    found: Trace = {}
    with torch.no_grad(), _hooks(model, found):
        outputs = model(**inputs)
    found[Point("", "output")] = outputs.logits.detach()
    return found


@contextmanager
def _hooks(model: nn.Module, found: Trace) -> Iterator[None]:
    layout = layout_of(model) if hasattr(model, "state_dict_adapter") else None
    handles = []
    for name, module in model.named_modules():
        if not name or isinstance(module, nn.ModuleList) or name.endswith(("act_fn", "activation_fn")):
            continue
        fusion = layout.fusion_of(name) if layout is not None else None
        names = [stored_name(model, name)] if layout is None else list(layout.hf_keys(name))

        def before(_: Any, args: Any, kwargs: Any, names: list[str] = names, fusion: Any = fusion) -> None:
            value = next((x for x in (*args, kwargs.get("hidden_states")) if isinstance(x, Tensor)), None)
            if value is not None and value.is_floating_point():
                if fusion is not None and fusion.columns is not None:  # a norm: its input is ordered as its weight is
                    value = fusion.split(value, dim=-1)[0]
                found.update({Point(each, "input"): value.detach() for each in names})

        def after(_: Any, args: Any, kwargs: Any, output: Any, names: list[str] = names, fusion: Any = fusion) -> None:
            if found_rope := re.search(r"rotary_emb(\.\w+)?$", names[0]):
                # the reference has one module for all layer types, and tells it which; the common decoder has one each
                kind = next((x for x in (*args, *kwargs.values()) if isinstance(x, str)), None)
                name = f"{names[0]}.{kind}" if kind and not found_rope[1] else names[0]
                found.update({Point(name, side): x.detach() for side, x in zip(("cos", "sin"), output, strict=True)})
                return
            value = output if isinstance(output, Tensor) else next(iter(_tensors(output)), None)
            if value is None:
                return
            parts = [value] if fusion is None else fusion.split(value, dim=-1)
            found.update({Point(each, "output"): x.detach() for each, x in zip(names, parts, strict=True)})

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Call:
    """A module and what it was called with."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def input(self) -> Tensor:
        """The hidden states that it was given."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def again(self, module: nn.Module | None = None, hidden_states: Tensor | None = None) -> Any:
        """Call ``module`` (default: the same) so, or on other hidden states."""
        args, kwargs = self.args, self.kwargs
        if hidden_states is not None:
            args = (hidden_states, *args[1:]) if args else ()
            kwargs = kwargs if args else kwargs | {"hidden_states": hidden_states}
        return (module or self.module)(*args, **kwargs)

    def double(self) -> "Call":
        """The same in float64."""
        return Call(self.module, _double(self.args), _double(self.kwargs))


def calls_of(model: nn.Module, ids: Tensor) -> dict[str, Call]:
    """What each module of the layers, and each norm, was called with in one forward pass."""
    layout = layout_of(model)
    calls: dict[str, Call] = {}
    handles = []
    for own, module in model.named_modules():
        name = next(iter(layout.hf_keys(own)))
        if "layers." in name or name.endswith("norm"):

            def before(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                calls[name] = Call(module, args, dict(kwargs))

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _double(item) for key, item in value.items()}
    return type(value)(map(_double, value)) if isinstance(value, tuple | list) else value


def first_tensor(output: Any) -> Tensor:
    """The output itself, or the first tensor in it."""
    return output if isinstance(output, Tensor) else next(_tensors(output))


def _tensors(output: Any) -> Iterator[Tensor]:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return (value for value in values if isinstance(value, Tensor))
