"""Training of all weights with products in float8, by torchao (Micikevicius et al. 2022, arXiv:2209.05433).

Weights, gradients and the optimizer stay as they are; a product's operands are scaled and rounded as it is made. What
that costs is a pass over each of them, so it pays in wide layers, and compiled, where the passes are one with others.
"""

import dataclasses
from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn

Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]
"""torchao's names: one scale a tensor, one a row, one a row and the weights' gradients in bf16."""

MULTIPLE = 16
"""Of the channels, which the hardware's products take."""


def check_float8(device: torch.device) -> None:
    """Whether products in float8 can be trained here.

    Raises:
        ImportError: torchao is not installed.
        ValueError: a device without such products.
    """
    if find_spec("torchao") is None:
        raise ImportError("model.float8 needs torchao, which is not installed: pip install torchao")
    if device.type != "cuda":
        raise ValueError(f"model.float8 needs a GPU; this is {device.type}. Leave it at off")
    if (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        raise ValueError(
            "model.float8 needs a GPU of compute capability 8.9 or higher (Ada, Hopper, ...); this one has "
            f"{capability[0]}.{capability[1]}. Leave it at off"
        )


def is_float8(module: nn.Module) -> bool:
    """Whether `to_float8` made it: torchao's own layer, which is not imported to ask."""
    return type(module).__module__.startswith("torchao.float8.")


def to_float8(model: nn.Module, recipe: Recipe, emulate: bool = False) -> list[str]:
    """Let linear layers multiply in float8, in place; their parameters stay the same ones. Returns their names.

    The output head does not: its rounding would go straight into the loss.

    Args:
        model: with plain linear layers, on any device.
        recipe: how operands are scaled.
        emulate: compute in fp32 what the hardware would, where there is none.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    chosen: list[str] = []

    def takes(module: nn.Module, name: str) -> bool:
        if module is head or not isinstance(module, nn.Linear) or any(n % MULTIPLE for n in module.weight.shape):
            return False
        chosen.append(name)
        return True

    config = Float8LinearConfig.from_recipe_name(recipe)
    # the weights' gradients are products over the tokens, of which there may be any number
    config = dataclasses.replace(config, pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(model, config=config, module_filter_fn=takes)
    return chosen
