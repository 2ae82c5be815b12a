"""Which implementation serves each part of a model, and why: what a training says when it begins."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nemo_automodel.components.kernels import launch
from nemo_automodel.components.kernels.add_norm import WIDEST
from nemo_automodel.components.kernels.gated import ACTIVATIONS
from nemo_automodel.components.models.common import cudnn
from nemo_automodel.components.models.common.attention import DecoderAttention
from nemo_automodel.components.models.common.capabilities import (
    ATTENTIONS,
    BY_IMPLEMENTATION,
    HALF,
    Capability,
    Need,
    absent,
    compute_of,
    missing,
)
from nemo_automodel.components.models.common.combined_projection.combined_mlp import CombinedGateUpMLP, PlainMLP
from nemo_automodel.components.models.common.decoder import DecoderModel
from nemo_automodel.components.models.common.graphs import ATTENTIONS as GRAPHED
from nemo_automodel.components.models.common.graphs import Graphs, host_bound, in_the_way
from nemo_automodel.components.models.common.norm import NARROW, LayerNorm, RMSNorm
from nemo_automodel.components.models.common.te.engine import package
from nemo_automodel.components.models.common.varlen import VARLEN, takes_bounds
from nemo_automodel.components.peft.lora import LoRALinear
from nemo_automodel.components.together import Together

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nemo_automodel.recipes.train import ModelConfig

KERNELS = "Triton kernels"
TRANSFORMER_ENGINE = "Transformer Engine"
SHORT = 4096
"""Tokens of a forward pass, which few have fewer than: a model that waits for the host with these mostly does."""
MEASURED = (9, 0)
"""Compute capability of the GPUs on which what ``auto`` takes was measured (benchmarks/RESULTS.md)."""

Test = Callable[[Any], Any]


@dataclass(frozen=True)
class Part:
    """A part of a decoder that the library has kernels for.

    Attributes:
        types: its modules.
        gaps: what the kernels do not cover, in words (with fields of the module) -> whether a module is of that kind.
    """

    types: tuple[type[nn.Module], ...]
    gaps: dict[str, Test]


PARTS = {
    "norms": Part(
        (RMSNorm, LayerNorm),
        {
            "layer norms": lambda norm: isinstance(norm, LayerNorm),
            "norms with a weight for each head": lambda norm: norm.weight.ndim > 1,
            f"norms of fewer than {NARROW} channels": lambda norm: norm.weight.shape[-1] < NARROW,
            f"norms of more than {WIDEST} channels": lambda norm: norm.weight.shape[-1] > WIDEST,
            "an offset added in low precision": lambda norm: norm.offset and not norm.fp32,
        },
    ),
    "gated MLP": Part(
        (CombinedGateUpMLP, PlainMLP),
        {
            "MLPs without a gate": lambda mlp: isinstance(mlp, PlainMLP),
            "activation {0.activation}": lambda mlp: mlp.activation not in ACTIVATIONS,
        },
    ),
    "RoPE": Part(
        (DecoderAttention,),
        {
            "layers without it": lambda attention: not attention.turns,
            "norms of queries and keys before it, other than over each head": lambda each: (
                each.qk_norm in ("per_head", "full") and not each.qk_norm_after_rope
            ),
        },
    ),
    "LoRA": Part(
        (LoRALinear,),
        {
            "DoRA": lambda layer: layer.dora,
            "dropout": lambda layer: not isinstance(layer.dropout, nn.Identity),
            "a shared A": lambda layer: layer.share_a,
            "adapters in another dtype": lambda layer: len(_dtypes(layer)) > 1,
        },
    ),
    "loss": Part(
        (nn.Linear,),  # the head
        {
            "an adapted head": lambda head: type(head) is not nn.Linear,
            "a head with a bias": lambda head: head.bias is not None,
        },
    ),
}

OWN_CLASS = "transformers' own class"

WITHOUT_KERNELS: dict[str, Callable[[Any, "ModelConfig"], Any]] = {
    "torch (asked for)": lambda _, options: options.backend.kernels != "auto",
    "torch (no GPU)": lambda model, _: _home(model)[0].type != "cuda" and not launch.INTERPRETED,
    "torch: Triton is not installed": lambda *_: launch.triton is None,
    "torch: weights of a dtype that the kernels do not have": lambda model, _: _home(model)[1] not in launch.DTYPES,
    "torch: the schedule takes backward passes apart": lambda model, _: model.backend.kernels != "auto",
}
"""Why no kernel runs at all, by the model and what it was built from; the first reason counts."""


def _with_rope(attention: DecoderAttention) -> list[nn.Module]:
    """Norms that RoPE's kernel computes as well."""
    together = attention.qk_norm == "head" and attention.turns and not attention.qk_norm_after_rope
    return [attention.get_submodule(name) for name in ("q_norm", "k_norm")] if together else []


def _dtypes(layer: LoRALinear) -> set[torch.dtype]:
    """Of what the kernels want in one dtype; a weight in float8 is apart."""
    found = {each.dtype for each in (*layer.lora_A.values(), *layer.lora_B.values())}
    return found if layer.scale is not None else found | {layer.weight.dtype}


def _home(model: "PreTrainedModel") -> tuple[torch.device, torch.dtype]:
    """Where the residual stream is, and in which dtype."""
    weight = next(model.parameters())  # of a pipeline's first stage the embeddings', of others a layer's
    return weight.device, weight.dtype


def attention_for(model: "PreTrainedModel", options: "ModelConfig", packing: bool) -> tuple[str | None, str]:
    """What ``auto`` takes for packed documents or whole rows, by transformers' name, and why.

    None: what the model has stays, which is sdpa wherever that can serve it.
    """
    backbone: Any = model.base_model
    asked = options.attn_implementation is not None or options.backend.attn != "auto"
    device, dtype = _home(model)
    rows = "packed documents without a mask" if packing else "rows are not packed"
    reasons = {
        "asked for": asked,
        OWN_CLASS: not isinstance(backbone, DecoderModel),
        rows: not packing and compute_of(device) != MEASURED,  # nor would the reasons below tell anything there
    }
    if (reason := next((words for words, holds in reasons.items() if holds), None)) is not None:
        return None, reason
    layer = next(each for each in backbone.modules() if isinstance(each, DecoderAttention))
    need = replace(layer.need(), device=device, dtype=dtype, backward=True)
    faster: list[str] = []
    for name in FASTER[packing]:
        attention = ATTENTIONS[name]
        if (reason := _why_not(attention, need, options, backbone) or _does_not_load(LOADED_BY[name])) is None:
            return attention.implementation, f"{rows}; {_than_this(faster)}"
        faster.append(f"{name} ({reason})")
    if packing and (gap := missing(BY_IMPLEMENTATION[VARLEN], need)) is not None:
        return None, f"varlen has no {gap.what}"
    return VARLEN if packing else None, f"{rows}; {_than_this(faster)}"


def _than_this(faster: list[str]) -> str:
    return f"faster {'are' if len(faster) > 1 else 'is'} {' and '.join(faster)}" if faster else "the fastest"


def _why_not(capability: Capability, need: Need, options: "ModelConfig", backbone: "DecoderModel") -> str | None:
    """Why ``auto`` leaves an attention alone that was the fastest where it was measured."""
    if (gap := missing(capability, need)) is not None:
        return f"has no {gap.what}"
    if (reason := absent(capability)) is not None:
        return reason
    reasons = {
        "was measured on Hopper only": need.device is not None and compute_of(need.device) != MEASURED,
        "may have been built without a softcap": need.softcap is not None and capability.has["softcap"] != "yes",
        "cuts compiled layers in two": options.compile,
        "would be computed again by selective checkpointing": options.gradient_checkpointing == "selective",
        "was not measured where steps are deterministic": torch.are_deterministic_algorithms_enabled(),
        "was not tried where ranks share sequences": backbone.context is not None,
        "was not tried in CUDA graphs, from which so small a model gains more": (
            capability.implementation not in GRAPHED
            and host_bound(backbone) > SHORT
            and options.cuda_graphs is not False
            and no_graphs(options, need.device or torch.device("meta"), Together().size > 1) is None
        ),
    }
    return next((words for words, holds in reasons.items() if holds), None)


FASTER = {True: ("flash4", "flash3", "te"), False: ("flash3", "flash4")}
"""Whether rows are packed -> attentions that are faster there than varlen, or than sdpa, the fastest first."""

LOADED_BY: dict[str, Callable[[], Any]] = {
    "flash3": partial(import_module, "flash_attn_interface"),
    "flash4": partial(import_module, "flash_attn.cute"),
    "te": partial(package, "pytorch"),
}
"""What finds out whether those that are installed load."""


@cache
def _does_not_load(load: Callable[[], Any]) -> str | None:
    try:
        load()
    except Exception as error:  # imports have assertions, libraries whatever they fail at
        return f"does not load: {error}"
    return None


def no_graphs(options: "ModelConfig", device: torch.device, several: bool) -> str | None:
    """What of a configuration does not go with CUDA graphs, in words; None: nothing.

    Args:
        options: of the model.
        device: on which it is trained.
        several: whether several ranks train it.
    """
    backend = options.backend
    reasons = {
        f"device {device.type}": device.type not in ("cuda", "meta"),
        "several ranks": several,
        "model.compile=true": options.compile,
        "model.cpu_offload=true": options.cpu_offload,
        f"model.gradient_checkpointing={options.gradient_checkpointing}": options.gradient_checkpointing,
        f"model.float8={options.float8}": options.float8 != "off",
        TRANSFORMER_ENGINE: "te" in (backend.attn, backend.linear, backend.rms_norm) or backend.rope_fusion,
    }
    return next((words for words, holds in reasons.items() if holds), None)


def refuse_graphs(reason: str) -> None:
    """Raise the error of what does not go with ``model.cuda_graphs=true``."""
    raise ValueError(f"model.cuda_graphs=true does not go with {reason}: set one of them back")


def graphs_for(model: "PreTrainedModel", options: "ModelConfig", packing: bool, several: bool) -> Graphs | None:
    """The CUDA graphs that may launch the layers of a model that is built; None: none.

    Raises:
        ValueError: they are asked for, and something is in the way.
    """
    backbone: Any = model.base_model
    device, _ = _home(model)
    if options.cuda_graphs is False or device.type == "meta":  # a plan of ranks, who launch nothing
        return None
    reason = no_graphs(options, device, several)
    if reason is None and not isinstance(backbone, DecoderModel):
        reason = OWN_CLASS
    if reason is None and packing and not takes_bounds(name := model.config._attn_implementation):
        reason = f"packed documents and attention {name!r}, which tells them apart by a mask"
    reason = reason or in_the_way(backbone)
    asked = options.cuda_graphs is True
    if reason is not None and asked:
        refuse_graphs(reason)
    if reason is not None or not (asked or compute_of(device) == MEASURED):
        return None
    graphs = Graphs(backbone, asked)
    return graphs if graphs.shapes else None


def served(model: "PreTrainedModel", options: "ModelConfig", packing: bool) -> dict[str, str]:
    """Part of the model -> what serves it, and why; parts that the model does not have are left out.

    Args:
        model: built, with its adapters.
        options: what it was built from.
        packing: whether rows hold several documents.
    """
    _, why = attention_for(model, options, packing)
    device, dtype = _home(model)
    half = device.type == "cuda" and dtype in HALF
    name = model.config._attn_implementation
    found = {"attention": f"{name}{', cuDNN first' if name == 'sdpa' and half else ''} ({why})"}
    if device.type == "cuda" and (words := cudnn.mixed()) is not None:
        found["warning"] = words
    if options.float8 != "off":
        found["linear layers"] = f"float8 by torchao, {options.float8} (asked for)"
    if not isinstance(model.base_model, DecoderModel):
        return {**found, "layers": OWN_CLASS}
    none = next((words for words, holds in WITHOUT_KERNELS.items() if holds(model, options)), None)
    inside = {module for each in model.modules() if isinstance(each, DecoderAttention) for module in _with_rope(each)}
    everywhere = [module for module in model.modules() if module not in inside]
    for title, part in PARTS.items():
        modules = [model.get_output_embeddings()] if title == "loss" else everywhere
        if of_part := [module for module in modules if isinstance(module, part.types)]:
            found[title] = none or _by_kernels(part, of_part)
    if (graphs := model.base_model.graphs) is not None:
        found["launches"] = graphs.description
    return found | _by_transformer_engine(model.backend)


def _by_transformer_engine(backend: Any) -> dict[str, str]:
    """Of a `BackendConfig`."""
    chosen = {"linear layers": backend.linear == "te", "norms": backend.rms_norm == "te", "RoPE": backend.rope_fusion}
    found = {title: f"{TRANSFORMER_ENGINE} (asked for)" for title, there in chosen.items() if there}
    if backend.te_fp8 is not None:
        found["linear layers"] = f"{TRANSFORMER_ENGINE}, float8 by recipe {backend.te_fp8.recipe!r} (asked for)"
    return found


def in_one_line(found: dict[str, str]) -> str:
    """``attention: sdpa (asked for); norms, RoPE: Triton kernels``."""
    alike: dict[str, list[str]] = {}
    for part, words in found.items():
        alike.setdefault(words, []).append(part)
    return "; ".join(f"{', '.join(parts)}: {words}" for words, parts in alike.items())


def _by_kernels(part: Part, modules: Iterable[Any]) -> str:
    gaps = Counter(next((words.format(m) for words, is_of in part.gaps.items() if is_of(m)), "") for m in modules)
    total, missing = gaps.total(), [words for words in gaps if words]
    by_torch = ", ".join(words if gaps[words] == total else f"{words} ({gaps[words]} of {total})" for words in missing)
    return ", ".join(filter(None, [KERNELS if gaps[""] else "", f"torch for {by_torch}" if missing else ""]))
