"""Adapters as peft stores them: ``adapter_model.safetensors`` and ``adapter_config.json``, Hugging Face's names."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nemo_automodel.components.peft.lora import LoRAConfig, LoRALinear

_PREFIX = "base_model.model."


def adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """peft's key -> the parameter, for every adapter of the model.

    ``layers.0.self_attn.qkv_proj``'s A for ``q_proj`` is ``base_model.model.layers.0.self_attn.q_proj.lora_A.weight``.
    """
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            parent = name.rpartition(".")[0]
            for part in module.lora_A:
                path = f"{_PREFIX}{parent}.{part}" if parent else f"{_PREFIX}{part}"
                tensors[f"{path}.lora_A.weight"] = module.lora_A[part]
                tensors[f"{path}.lora_B.weight"] = module.lora_B[part]
    return tensors


@torch.no_grad()
def load_adapter_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy adapter tensors (peft's keys) into a model that `apply_lora` prepared.

    Raises:
        ValueError: keys missing, not used, or of another shape; nothing is copied then.
    """
    own = adapter_tensors(model)
    problems = [f"{key}: missing" for key in own if key not in tensors]
    problems += [f"{key}: not used by this model" for key in tensors if key not in own]
    problems += [
        f"{key}: shape {list(tensors[key].shape)}, not {list(value.shape)}"
        for key, value in own.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if problems:
        raise ValueError("the adapter does not fit the model:\n  " + "\n  ".join(problems[:8]))
    for key, parameter in own.items():
        parameter.copy_(tensors[key])


def save_adapter(model: nn.Module, folder: Path, config: LoRAConfig, base_model: str) -> None:
    """Write the adapters into ``folder`` (which exists), for ``peft.PeftModel.from_pretrained(base, folder)``.

    Args:
        model: as `apply_lora` left it.
        folder: where the two files go.
        config: what `apply_lora` was given.
        base_model: path or Hub id of the model the adapters belong to.
    """
    tensors = adapter_tensors(model)
    targets = sorted({key.removesuffix(".lora_A.weight").rpartition(".")[2] for key in tensors if "lora_A" in key})
    save_file(
        {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(description, indent=2) + "\n")
