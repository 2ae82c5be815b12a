"""Adapters into a model, their starting values, and adapters folded into the weights."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from nemo_automodel.components.kernels.linear import Linear
from nemo_automodel.components.layout import Layout
from nemo_automodel.components.peft.config import ALL_LINEAR, LoRAConfig, Update, by_pattern
from nemo_automodel.components.peft.lora import LoRALinear
from nemo_automodel.components.placement import fill, whole


def apply_lora(model: nn.Module, config: LoRAConfig, layout: Layout) -> list[str]:
    """Freeze ``model`` and put adapters on the targeted projections; returns the adapted modules' names.

    On a model whose weights are on the meta device the adapters are made there too; call `init_adapters` once the
    weights are loaded.

    Raises:
        ValueError: a target or pattern that is no projection of the model (the message lists those there are), none
            at all, or adapters that are there already.
    """
    refuse_adapters(model)
    head = output_head(model)
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    parts = {name: part_paths(name, layout) for name in linears}
    known = {leaf(path) for paths in parts.values() for path in paths} | {leaf(name) for name in linears}
    everything = config.targets == [ALL_LINEAR]
    if not everything and (unknown := sorted(set(config.targets) - known)):
        raise ValueError(
            f"targets: {unknown[0]!r} is no projection of this model; there are {', '.join(sorted(known))}"
        )

    planned = {}
    for name in linears:
        paths = [p for p in parts[name] if everything or leaf(p) in config.targets or leaf(name) in config.targets]
        if paths:
            planned[name] = {leaf(path): config.update(path) for path in paths}
    if not planned:
        raise ValueError("LoRA found no linear projection to adapt in this model")
    for name in planned:
        if (reason := getattr(linears[name], "no_adapters", None)) is not None:
            raise ValueError(f"{name} takes no adapters: {reason}")
    _refuse_idle_patterns(config, [path for name in planned for path in parts[name]])
    layers = {
        name: adapted_layer(
            linears[name],
            name,
            updates,
            layout,
            dropout=config.dropout,
            dora=config.dora,
            share_a=config.share_a,
        )
        for name, updates in planned.items()
    }
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    if not any(layer.weight.is_meta for layer in layers.values()):
        init_adapters(model)
    return list(layers)


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int | None = None) -> None:
    """Give every adapter its starting values, as peft does: the model then computes what it did without them.

    A is uniform (Kaiming, a = sqrt(5)), drawn in fp32 by a generator of its name and the seed, so that ranks with one
    seed agree whichever layers they have; B is zero; a DoRA magnitude is the row norm of the base weight, in fp32.
    Parameters may be sharded (DTensors): every rank then calls this.

    Args:
        model: whole, or some of its layers.
        seed: default: drawn from torch's CPU generator.

    Raises:
        ValueError: weights that are still on the meta device.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    for name, layer in lora_layers(model):
        for part, a in layer.lora_A.items():
            digest = hashlib.sha256(f"{seed} {name}.{part}".encode()).digest()
            own = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            full = torch.empty(a.shape, dtype=torch.float32, device="cpu")
            fill(a, nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=own))
        for b in layer.lora_B.values():
            fill(b, torch.zeros(b.shape, dtype=b.dtype))
        if layer.dora:
            norms = torch.linalg.vector_norm(whole(layer.weight).float(), dim=1)
            parts = layer.fusion.split(norms) if layer.fusion else [norms]
            for part, norm in zip(layer.parts, parts, strict=True):
                if part in layer.lora_magnitude:
                    fill(layer.lora_magnitude[part], norm)


def quantize_base(model: nn.Module) -> None:
    """Keep the weights under all adapters in float8; see `LoRALinear.quantize`.

    Raises:
        ValueError: adapters that need the weights as they were.
    """
    for _, layer in lora_layers(model):
        layer.quantize()


def join_adapters(model: nn.Module) -> None:
    """Let the kernels compute adapters inside their layers' own products, where a weight is whole on this GPU."""
    for _, layer in lora_layers(model):
        if layer.can_join():
            layer.join()


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Fold every adapter into its weight (added in fp32, rounded once) and put plain linear layers back.

    A weight that another module shares (a tied head that was adapted) is replaced, not changed: see `untie`. A model
    under ``fully_shard`` can be saved after this, and no longer run: FSDP does not know the new layers.
    """
    for name, module in list(lora_layers(model)):
        module.separate()
        untie(model, f"{name}.weight")
        linear = Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight, linear.bias = module.weight, module.bias
        fill(linear.weight, module.merged_weight())
        model.set_submodule(name, linear.train(module.training))


@torch.no_grad()
def untie(model: nn.Module, name: str) -> None:
    """Give ``name`` a parameter of its own where it is tied to another one, and say so in the model's config."""
    parameter = model.get_parameter(name)
    named = model.named_parameters(remove_duplicate=False)
    others = [other for other, value in named if value is parameter and other != name]
    if not others:
        return
    path, _, attribute = name.rpartition(".")
    own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    setattr(model.get_submodule(path), attribute, own)
    if (config := getattr(model, "config", None)) is not None:
        config.tie_word_embeddings = False
    pair = {name, *others}
    for tied in {id(t): t for m in model.modules() if (t := getattr(m, "all_tied_weights_keys", None))}.values():
        for target in [target for target, source in tied.items() if {target, source} <= pair]:
            del tied[target]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def adapted_layer(
    linear: nn.Linear, name: str, updates: Mapping[str, Update], layout: Layout, **options: Any
) -> LoRALinear:
    """``linear``, the model's layer called ``name``, with adapters; ``updates`` has the checkpoint's names of parts."""
    fusion = layout.fusion_of(name)
    called = leaf(name) if fusion else leaf(part_paths(name, layout)[0])
    return LoRALinear(linear, called, updates, fusion, **options)


def part_paths(name: str, layout: Layout) -> list[str]:
    """Hugging Face's module paths for the linear layer ``name``: those of its parts, or its own."""
    return list(layout.hf_keys(name))


def leaf(path: str) -> str:
    """The last name in a module's path."""
    return path.rpartition(".")[2]


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that gives logits, None where the model does not say."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def refuse_adapters(model: nn.Module) -> None:
    """Raise a ValueError when the model has adapters."""
    if (name := next((name for name, _ in lora_layers(model)), None)) is not None:
        raise ValueError(f"{name} has an adapter already; fold it in first (merge_lora)")


def _refuse_idle_patterns(config: LoRAConfig, paths: list[str]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if not any(by_pattern({pattern: True}, path, False) for path in paths):
                raise ValueError(f"{field}: {pattern!r} matches none of the adapted projections, such as {paths[0]}")
