"""How much arithmetic a token of training is, and how fast this device multiplies matrices."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM
from nemo_automodel.components.models.common.spec import DecoderSpec

FORMULA = (
    "model FLOP of a token = k * (weights that multiply, head included) + 3.5 * attention. k is 2 forward, 2 for the "
    "input's gradient and 2 for the weight's: 6 when all are trained, 4 under adapters, whose own products (about 1%) "
    "do not count. attention = 4 * heads * head_dim * mean tokens seen (half of the row where it is causal), once "
    "forward and 2.5 times backward"
)


@dataclass(frozen=True)
class Arithmetic:
    """What a token costs in one model.

    Attributes:
        weights: that multiply a token's activations: all matrices but the embedding, and the head.
        attention: floating-point operations of the scores and their sums, forward.
    """

    weights: int
    attention: float

    def per_token(self, all_weights: bool) -> float:
        """Floating-point operations of a token's training, by `FORMULA`."""
        return (6 if all_weights else 4) * self.weights + 3.5 * self.attention


def arithmetic(folder: str, length: int) -> Arithmetic:
    """Count from the model itself, built without memory from ``folder``'s config, in rows of ``length`` tokens."""
    config = AutoConfig.from_pretrained(folder)
    model: Any = NeMoAutoModelForCausalLM.from_config(config, device="meta")
    spec = getattr(getattr(model, "model", None), "spec", None)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    windows = (
        _windows(config)
        if not isinstance(spec, DecoderSpec)
        else [spec.sliding_window if kind == "sliding_attention" else None for kind in spec.layer_types]
    )
    return Arithmetic(
        weights=sum(weight.numel() for weight in _multiplying(model)),
        attention=sum(4 * width * _mean_seen(length, window) for window in windows),
    )


def _multiplying(model: Any) -> list[torch.Tensor]:
    head = model.get_output_embeddings()
    modules = [
        module
        for module in model.modules()
        if module is not head and not isinstance(module, nn.Embedding) and "Norm" not in type(module).__name__
    ]
    weights = [getattr(module, "weight", None) for module in [*modules, head]]
    return [weight for weight in weights if isinstance(weight, torch.Tensor) and weight.ndim == 2]


def _windows(config: Any) -> list[int | None]:
    """The window of each layer, by the fields that transformers' configs have for it."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _mean_seen(length: int, window: int | None) -> float:
    """Tokens that a token of a row sees in the mean, where the square's diagonal counts half."""
    window = min(window or length, length)
    return window - window * window / (2 * length)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product of random values, the best of some rounds."""
    size, repeats, rounds = (8192, 10, 20) if device.type == "cuda" else (1024, 2, 5)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    out = torch.empty_like(a)

    def once() -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    return 2 * size**3 * repeats / min(once() for _ in range(rounds))
