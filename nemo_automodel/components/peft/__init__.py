"""Low-rank adapters on fused projections, with peft's names and files."""

from nemo_automodel.components.peft.adapter import PeftAdapter
from nemo_automodel.components.peft.config import LoRAConfig
from nemo_automodel.components.peft.files import (
    adapter_tensors,
    layout_of,
    load_adapter_tensors,
    save_adapter,
    stored_rows,
)
from nemo_automodel.components.peft.lora import LoRALinear
from nemo_automodel.components.peft.model import apply_lora, init_adapters, join_adapters, merge_lora, quantize_base

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "PeftAdapter",
    "adapter_tensors",
    "apply_lora",
    "init_adapters",
    "join_adapters",
    "layout_of",
    "load_adapter_tensors",
    "merge_lora",
    "quantize_base",
    "save_adapter",
    "stored_rows",
]
