"""Low-rank adapters on fused projections, with peft's names and files."""

from nemo_automodel.components.peft.files import adapter_tensors, load_adapter_tensors, save_adapter
from nemo_automodel.components.peft.lora import LoRAConfig, LoRALinear, apply_lora, merge_lora

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "adapter_tensors",
    "apply_lora",
    "load_adapter_tensors",
    "merge_lora",
    "save_adapter",
]
