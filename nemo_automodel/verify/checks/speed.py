"""Whether the implementation is as fast as it should be, on the device at hand."""

import copy
import math
import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from nemo_automodel.verify.check import Check
from nemo_automodel.verify.outcome import Difference, Outcome, judge
from nemo_automodel.verify.shrink import LENGTH
from nemo_automodel.verify.subject import Subject

FACTOR = 4
_SCALED = (
    "hidden_size",
    "intermediate_size",
    "shared_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "mamba_d_head",
)
BATCH, ROUNDS, MOST_ROUNDS = 4, 7, 70
"""A round is a step of each; rounds go on up to the last number while the implementation looks too slow."""

SLOWEST = 1.5
"""How many times the reference's time a step may take. Fused projections should make it faster; only what is plainly
wrong (a loop over heads, a copy of the cache, attention without its kernel) is called a failure."""


def training_speed(subject: Subject) -> Outcome:
    """Forward and backward of a model of middle size, by turns with the reference's.

    The least times are compared: other programs on the machine only ever add to one.
    """
    config, ids = _middle(subject.config), subject.tokens(BATCH, 2 * LENGTH)
    attn, models = _pair(subject, config)
    least = [math.inf, math.inf]
    for number in range(MOST_ROUNDS + 1):
        for column, model in enumerate(models):
            seconds = _step(model, ids)
            if number:  # the first round allocates and chooses kernels
                least[column] = min(least[column], seconds)
        if number >= ROUNDS and least[0] <= SLOWEST * least[1]:
            break
    ours, reference = (1000 * seconds for seconds in least)
    return judge(
        [Difference("ms per step", ours, SLOWEST * reference)],
        f"{ours:.1f} ms a step, {ours / reference:.2f} of the reference's {reference:.1f} ms (with {attn})",
        hint=f"the reference takes {reference:.1f}; run it again where nothing else runs before believing it",
    )


def _step(model: Any, ids: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    model.zero_grad()
    start = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    if ids.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def _middle(tiny: PreTrainedConfig) -> PreTrainedConfig:
    """Wide enough that matrix products take the time; per-head sizes stay, and with them what is derived of them."""
    config = copy.deepcopy(tiny)
    for name in _SCALED:
        if isinstance(value := getattr(config, name, None), int):
            setattr(config, name, FACTOR * value)
    return type(config)(**{k: v for k, v in config.to_dict().items() if k not in ("model_type", "dtype")})


def _pair(subject: Subject, config: PreTrainedConfig) -> tuple[str, list[Any]]:
    """The implementation and the reference with random weights, with sdpa where both take it."""
    classes = (subject.target.model_class, subject.target.reference_class)
    for attn in ("sdpa", "eager"):
        config._attn_implementation = attn
        try:
            return attn, [each(copy.deepcopy(config)).to(subject.device).train() for each in classes]
        except ValueError:
            if attn == "eager":
                raise
    raise AssertionError


CHECKS = [Check("speed", "training step", training_speed, slow=True)]
