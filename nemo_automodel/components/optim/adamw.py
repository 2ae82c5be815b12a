"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) that never loses an update to bf16.

A bf16 parameter has 8 bits of mantissa: an update below 1/256 of its value vanishes. Parameters in low precision
therefore have an fp32 master copy, gradients add up in fp32 (also over accumulation), and the parameter is the
master's rounding after each step.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from nemo_automodel.components.placement import whole


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW and its schedule.

    Raises:
        ValueError: a value out of range, by the field's name.
    """

    lr: float = field(default=2e-5, metadata={"help": "peak learning rate"})
    weight_decay: float = field(default=0.0, metadata={"help": "decoupled decay of matrices (not of norms and biases)"})
    beta1: float = field(default=0.9, metadata={"help": "decay of the first moment"})
    beta2: float = field(default=0.999, metadata={"help": "decay of the second moment"})
    eps: float = field(default=1e-8, metadata={"help": "added to the root of the second moment"})
    schedule: Literal["cosine", "linear", "constant"] = field(
        default="cosine", metadata={"help": "how the learning rate falls after the warm-up"}
    )
    warmup_steps: int = field(default=0, metadata={"help": "optimizer steps over which the learning rate rises"})
    min_lr_ratio: float = field(default=0.0, metadata={"help": "share of the peak learning rate at the last step"})
    max_grad_norm: float | None = field(default=1.0, metadata={"help": "clip gradients to this norm; null: do not"})

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} must be above 0")
        for name in ("weight_decay", "eps", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio={self.min_lr_ratio} must be in [0, 1]")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be above 0, or null")

    def lr_at(self, step: int, total_steps: int) -> float:
        """Learning rate of optimizer step ``step`` (the first is 0) of ``total_steps``."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(1, total_steps - 1 - self.warmup_steps)
        done = min(1.0, done)
        shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[self.schedule]
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * shape)


class MasterAdamW:
    """AdamW over named parameters, with fp32 masters for those in low precision.

    Args:
        parameters: names and trainable parameters.
        config: hyperparameters.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig):
        self.config = config
        self.parameters = dict(parameters)
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            self.masters[name] = parameter if parameter.dtype == torch.float32 else self._master_of(parameter)
        decayed = [master for master in self.masters.values() if master.ndim >= 2]
        others = [master for master in self.masters.values() if master.ndim < 2]
        self._adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        # here, not at the first step: a checkpoint is loaded into them
        for master in self.masters.values():
            self._adamw.state[master] = {
                "step": torch.zeros((), device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def step(self, lr: float) -> float:
        """Clip, update with learning rate ``lr``, drop the gradients; returns the gradients' norm before clipping.

        Raises:
            FloatingPointError: the norm is not finite; nothing was updated.
        """
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(value := norm.item()):
            raise FloatingPointError(f"the gradients' norm is {value}")
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.masters.values(), self.config.max_grad_norm, norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._round_masters()
        return value

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments, step counts and masters, by parameter name: the optimizer's own, to be saved or filled in place."""
        tensors = {
            f"{key}.{name}": value
            for name, master in self.masters.items()
            for key, value in self._adamw.state[master].items()
        }
        return tensors | {f"master.{name}": self.masters[name] for name in self.masters if self._has_master(name)}

    def state_was_loaded(self) -> None:
        """To be called once `state_tensors` were filled: parameters become the roundings of their masters."""
        self._round_masters()

    def _has_master(self, name: str) -> bool:
        return self.masters[name] is not self.parameters[name]

    @torch.no_grad()
    def _round_masters(self) -> None:
        for name, master in self.masters.items():
            if self._has_master(name):
                self.parameters[name].copy_(master)

    @staticmethod
    def _master_of(parameter: nn.Parameter) -> Tensor:
        master = parameter.detach().float().requires_grad_()

        def take_gradient(low: Tensor) -> None:
            assert low.grad is not None
            if master.grad is None:
                master.grad = low.grad.float()
            else:
                master.grad.add_(low.grad)
            low.grad = None

        parameter.register_post_accumulate_grad_hook(take_gradient)
        return master
