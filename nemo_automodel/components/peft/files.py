"""Adapters as peft stores them: ``adapter_model.safetensors`` and ``adapter_config.json``, Hugging Face's names."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nemo_automodel.components.layout import Fusion, Layout
from nemo_automodel.components.peft.config import LoRAConfig, Update
from nemo_automodel.components.peft.lora import LoRALinear
from nemo_automodel.components.peft.model import leaf, lora_layers, part_paths
from nemo_automodel.components.placement import fill, whole
from nemo_automodel.components.problems import listed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


@dataclass(frozen=True)
class Replaced:
    """Weights of the model that came with an adapter, and must leave with it again.

    Attributes:
        bias: peft's ``bias`` option: ``"none"``, ``"all"`` or ``"lora_only"``.
        modules_to_save: peft's option of that name.
        keys: the adapter file's keys (without `PREFIX`) -> Hugging Face's name of the replaced parameter.
    """

    bias: str
    modules_to_save: list[str] | None
    keys: Mapping[str, str]


def adapter_tensors(model: nn.Module, layout: Layout | None = None) -> dict[str, nn.Parameter]:
    """peft's key -> the parameter, for every adapter of the model; a shared A stands under the key of each part.

    Rows are ordered as those of the fused weight; `stored_rows` puts them in peft's order.
    ``layers.0.self_attn.qkv_proj``'s A for ``q_proj`` is ``base_model.model.layers.0.self_attn.q_proj.lora_A.weight``.
    """
    tensors = {}
    for path, layer, part in _adapted(model, layout or layout_of(model)):
        tensors[f"{PREFIX}{path}{A}"] = layer.a_of(part)
        tensors[f"{PREFIX}{path}{B}"] = layer.lora_B[part]
        if layer.dora:
            tensors[f"{PREFIX}{path}{MAGNITUDE}"] = layer.lora_magnitude[part]
    return tensors


def stored_rows(model: nn.Module, tensors: Mapping[str, Tensor], layout: Layout | None = None) -> dict[str, Tensor]:
    """``tensors``, by the keys of `adapter_tensors` and ordered as those are, with their rows in peft's order."""
    fusions = _fusions(model, layout or layout_of(model))
    return {k: fusions[k][0].to_stored(t, fusions[k][1]) if k in fusions else t for k, t in tensors.items()}


def own_rows(model: nn.Module, tensors: Mapping[str, Tensor], layout: Layout | None = None) -> dict[str, Tensor]:
    """The inverse of `stored_rows`."""
    fusions = _fusions(model, layout or layout_of(model))
    return {k: fusions[k][0].from_stored(t, fusions[k][1]) if k in fusions else t for k, t in tensors.items()}


@torch.no_grad()
def load_adapter_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy adapter tensors (peft's keys) into a model that `apply_lora` prepared, sharded or not.

    Raises:
        ValueError: keys missing, not used, or of another shape, or different A where the model shares one; nothing is
            copied then.
    """
    own = adapter_tensors(model)
    problems = [f"{key}: missing" for key in own if key not in tensors]
    problems += [f"{key}: not used by this model" for key in tensors if key not in own]
    problems += [
        f"{key}: shape {list(tensors[key].shape)}, not {list(value.shape)}"
        for key, value in own.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if not problems:
        first: dict[int, str] = {}
        for key, value in own.items():
            if not torch.equal(tensors[key], tensors[other := first.setdefault(id(value), key)]):
                problems.append(f"{key}: differs from {other}, but the model shares one A (share_a)")
    refuse("the adapter does not fit the model", problems)
    tensors = own_rows(model, tensors)
    for key, parameter in own.items():
        fill(parameter, tensors[key])


def save_adapter(
    model: nn.Module,
    folder: Path,
    config: LoRAConfig | None = None,
    base_model: str = "",
    *,
    layout: Layout | None = None,
    writes: bool = True,
) -> None:
    """Write the adapters into ``folder`` (which exists), for ``peft.PeftModel.from_pretrained(base, folder)``.

    Weights that came with an adapter (``modules_to_save``, biases) are written with it. The tensors keep their dtype.
    A sharded model is gathered: every rank calls this then.

    Args:
        model: as `apply_lora` or `PeftAdapter` left it.
        folder: where the two files go.
        config: what `apply_lora` was given; its ``r`` and ``alpha`` become the file's defaults.
        base_model: path or Hub id of the model the adapters belong to.
        layout: the model's table of fused projections (default: its ``state_dict_adapter``'s).
        writes: False gathers only.

    Raises:
        ValueError: the model has no adapters.
    """
    layout = layout or layout_of(model)
    adapted = _adapted(model, layout)
    if not adapted:
        raise ValueError("the model has no adapters to save: apply_lora first, or save_pretrained for a whole model")
    gathered = {key: whole(value) for key, value in adapter_tensors(model, layout).items()}
    tensors = stored_rows(model, gathered, layout)
    replaced: Replaced | None = getattr(model, "_replaced_by_adapter", None)
    for key, name in (replaced.keys if replaced else {}).items():
        tensors[PREFIX + key] = read_parameter(model, layout, name)
    if not writes:
        return
    # a copy each: safetensors refuses tensors that share memory
    tensors = {key: value.cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        **_ranks({path: layer.updates[part] for path, layer, part in adapted}, config),
        "lora_dropout": getattr(adapted[0][1].dropout, "p", 0.0),
        "use_dora": adapted[0][1].dora,
        "target_modules": _targets(model, layout, {path for path, _, _ in adapted}),
        "modules_to_save": replaced.modules_to_save if replaced else None,
        "bias": replaced.bias if replaced else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if type(model).__name__.endswith("ForSequenceClassification"):
        description["task_type"] = "SEQ_CLS"
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n")


def read_parameter(model: nn.Module, layout: Layout, name: str) -> Tensor:
    """The parameter that Hugging Face calls ``name``, whole, out of the fused one that holds it."""
    place = layout.locate(name)
    value = whole(model.get_parameter(place.own))
    return place.fusion.read_part(value, place.part) if place.fusion else value


def layout_of(model: nn.Module) -> Layout:
    """The model's table of fused projections; empty for transformers' own classes."""
    adapter = getattr(model, "state_dict_adapter", None)
    return adapter.layout if adapter is not None else Layout(())


def refuse(what: str, problems: list[str]) -> None:
    """Raise a ValueError that lists the first of the problems and counts the rest; none of them: do nothing."""
    if problems:
        raise ValueError(f"{what}:\n  {listed(problems)}")


def _adapted(model: nn.Module, layout: Layout) -> list[tuple[str, LoRALinear, str]]:
    """Hugging Face's path, the layer and the part's name, for every adapted projection."""
    return [
        (path, layer, leaf(path))
        for name, layer in lora_layers(model)
        for path in part_paths(name, layout)
        if leaf(path) in layer.updates
    ]


def _fusions(model: nn.Module, layout: Layout) -> dict[str, tuple[Fusion, str]]:
    """peft's key of what has a row for each of a fused part's -> the fusion and the part."""
    return {
        f"{PREFIX}{path}{kind}": (fusion, part)
        for path, _, part in _adapted(model, layout)
        if (fusion := layout.locate(f"{path}.weight").fusion) is not None
        for kind in (B, MAGNITUDE)
    }


def _ranks(updates: Mapping[str, Update], config: LoRAConfig | None) -> dict[str, Any]:
    """peft's fields for rank and scale: defaults, and a pattern for each projection that differs."""
    r = config.r if config else Counter(update.r for update in updates.values()).most_common(1)[0][0]
    alpha = config.alpha if config else Counter(update.alpha for update in updates.values()).most_common(1)[0][0]
    anchored = {path: "^" + path.replace(".", r"\.") for path in updates}
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {anchored[path]: update.r for path, update in updates.items() if update.r != r},
        "alpha_pattern": {anchored[path]: update.alpha for path, update in updates.items() if update.alpha != alpha},
        "use_rslora": next(iter(updates.values())).rslora,
    }


def _targets(model: nn.Module, layout: Layout, adapted: set[str]) -> list[str]:
    """peft's ``target_modules``: last names where they mean these projections and no other, else whole paths."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    spared = {leaf(path) for name in linears for path in part_paths(name, layout) if path not in adapted}
    return sorted({path if leaf(path) in spared else leaf(path) for path in adapted})
