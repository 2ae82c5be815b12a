"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) that never loses an update to bf16.

Bytes per bf16 parameter, itself and its gradient (2 + 2) included, with one micro-batch a step:

    masters     moments     parameter, gradient, low bits, moments
    exact       float32     2 + 2 + 2 + 8 = 14
    exact       bfloat16    2 + 2 + 2 + 4 = 10
    stochastic  float32     2 + 2 + 0 + 8 = 12
    stochastic  bfloat16    2 + 2 + 0 + 4 =  8

With several micro-batches a gradient is summed in fp32: 4 bytes instead of 2. An fp32 parameter has no master: 4 + 4
and its moments. How masters and roundings work is told beside the kernel, `components/kernels/adamw.py`.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_automodel.components.kernels.adamw import Hyper, Slot, adamw, join
from nemo_automodel.components.kernels.squares import sum_of_squares
from nemo_automodel.components.placement import local
from nemo_automodel.components.together import Together


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
    masters: Literal["exact", "stochastic"] = field(
        default="exact",
        metadata={
            "help": "how bfloat16 parameters keep small updates: exact: float32 masters, 2 bytes a parameter more; "
            "stochastic: none, parameters are rounded up or down at random"
        },
    )
    moments: Literal["float32", "bfloat16"] = field(
        default="float32",
        metadata={"help": "dtype of both moments; bfloat16 saves 4 bytes a parameter, rounds at random"},
    )

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} must be above 0")
        for name in ("weight_decay", "eps", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        for name, values in (("masters", ("exact", "stochastic")), ("moments", ("float32", "bfloat16"))):
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)} must be {' or '.join(values)}")
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
    """AdamW over named parameters, which may be sharded (DTensor).

    Nothing here waits for the device: `step` returns the gradients' norm as a tensor. Once a norm is not finite, no
    step updates anything any more: not that one, nor those that were queued before the host read it.

    Args:
        parameters: names and trainable parameters, in float32 or bfloat16.
        config: hyperparameters.
        seed: of random roundings; what a step draws is a function of it and the parameter's count of steps.
        ranks: that have these parameters, whole or in shards; other ranks of the run have others (pipeline stages).
        shared: of those that other stages have too, name -> the ranks with one copy each, whose gradients are added.

    Attributes:
        accumulating: whether gradients of several backward passes add up until the next step; in fp32 then, in tensors
            of their own. If not, a gradient stays in its parameter's dtype.

    Raises:
        ValueError: a parameter of another dtype, or whose elements do not lie in a row.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimConfig,
        seed: int = 0,
        ranks: int | None = None,
        shared: Mapping[str, dist.ProcessGroup] | None = None,
    ):
        self.config = config
        self._ranks = Together().size if ranks is None else ranks
        self._shared = dict(shared or {})
        self.parameters = dict(parameters)
        self.accumulating = True
        self._seed = seed
        self._sums: dict[str, Tensor] = {}
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._low: dict[str, Tensor] = {}
        self._steps = torch.zeros(len(self.parameters), dtype=torch.int64)
        for name, parameter in self.parameters.items():
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"{name} is in {parameter.dtype}; AdamW takes parameters in float32 and bfloat16")
            if not local(parameter).is_contiguous():
                raise ValueError(
                    f"{name} is a view with strides {local(parameter).stride()}; AdamW updates memory in a row, so "
                    "make the parameter contiguous before the optimizer is built"
                )
            low_precision = parameter.dtype == torch.bfloat16
            dtype = getattr(torch, config.moments)
            self._moments[name] = torch.zeros_like(parameter, dtype=dtype), torch.zeros_like(parameter, dtype=dtype)
            if low_precision:
                parameter.register_post_accumulate_grad_hook(self._adding(name))
                if config.masters == "exact":
                    self._low[name] = torch.zeros_like(parameter, dtype=torch.int16)
        device = next((p.device for p in self.parameters.values()), torch.device("cpu"))
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Clip, update with learning rate ``lr``, drop the gradients; returns their norm before clipping.

        If it is not finite, nothing is updated, now and in all steps to come.
        """
        gradients = {name: self._sums.get(name, p.grad) for name, p in self.parameters.items()}
        present = {name: _complete(g, self.parameters[name]) for name, g in gradients.items() if g is not None}
        for name, group in self._shared.items():
            dist.all_reduce(local(present[name]), group=group)
        norm = self._total_norm(present)
        self._finite.logical_and_(norm.isfinite())
        factor = torch.ones_like(norm)
        if self.config.max_grad_norm is not None:
            factor = (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        config = self.config
        hyper = Hyper(lr=lr, beta1=config.beta1, beta2=config.beta2, eps=config.eps, seed=self._seed)
        numbers = [number for number, name in enumerate(self.parameters) if name in present]
        self._steps[numbers] += 1
        steps = self._steps.tolist()
        slots = [self._slot(steps[n], *one) for n, one in zip(numbers, present.items(), strict=True)]
        adamw(slots, factor.masked_fill(~self._finite, math.nan), hyper)
        self._sums.clear()
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm

    def _total_norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """2-norm over all gradients of all ranks, in fp32 whatever their dtypes; of whole copies one counts.

        `torch.nn.utils.get_total_norm` rounds the norm of each to its dtype, and takes DTensors of one mesh only.
        """
        squares = torch.zeros_like(self._finite, dtype=torch.float64)
        by_kind: dict[tuple[torch.dtype, float], list[Tensor]] = {}
        for name, gradient in gradients.items():
            copies = self._ranks / _shards(gradient) * (dist.get_world_size(g) if (g := self._shared.get(name)) else 1)
            by_kind.setdefault((gradient.dtype, copies), []).append(local(gradient))
        for (_, copies), alike in by_kind.items():
            squares += sum_of_squares(alike) / copies
        return Together().add(squares).sqrt().float()

    def master(self, name: str) -> Tensor:
        """A parameter as the optimizer knows it, in fp32."""
        parameter = self.parameters[name].detach()
        return join(local(parameter), local(self._low[name])) if name in self._low else parameter.float()

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments, masters' low bits and step counts: the optimizer's own, to be saved or filled in place.

        With the parameters, which have the masters' high bits, they are all that a resumed run needs.
        """
        tensors: dict[str, Tensor] = {}
        for number, (name, (exp_avg, exp_avg_sq)) in enumerate(self._moments.items()):
            step = self._steps[number : number + 1]
            tensors |= {f"step.{name}": step, f"exp_avg.{name}": exp_avg, f"exp_avg_sq.{name}": exp_avg_sq}
        return tensors | {f"low.{name}": low for name, low in self._low.items()}

    def _slot(self, step: int, name: str, gradient: Tensor) -> Slot:
        parameter, low = self.parameters[name], self._low.get(name)
        exp_avg, exp_avg_sq = self._moments[name]
        return Slot(
            parameter=local(parameter.detach()),
            gradient=local(gradient).contiguous(),
            exp_avg=local(exp_avg),
            exp_avg_sq=local(exp_avg_sq),
            low=None if low is None else local(low),
            step=step,
            weight_decay=self.config.weight_decay if parameter.ndim >= 2 else 0.0,
            stream=crc32(name.encode()),  # its number would be another one on another pipeline stage
            shard=_shard(parameter),
        )

    def _adding(self, name: str) -> Callable[[Tensor], None]:
        # autograd holds what a hook holds, out of the garbage collector's sight: weights and moments would never go
        optimizer = weakref.ref(self)

        def add(parameter: Tensor) -> None:
            if (owner := optimizer()) is None or not owner.accumulating:
                return
            if parameter.grad is None:
                raise RuntimeError(
                    f"{name}: its gradient went to another MasterAdamW of it, which must be dropped first"
                )
            if name in owner._sums:
                owner._sums[name].add_(parameter.grad)
            else:
                owner._sums[name] = parameter.grad.float()
            parameter.grad = None

        return add


def _complete(gradient: Tensor, parameter: Tensor) -> Tensor:
    """``gradient`` placed as the parameter is: terms that tensor parallelism left to its ranks are added, in fp32."""
    if not (isinstance(gradient, DTensor) and isinstance(parameter, DTensor)):
        return gradient
    terms = any(each.is_partial() for each in gradient.placements)
    placed: DTensor = gradient.float() if terms else gradient  # type: ignore[assignment]
    return placed.redistribute(placements=parameter.placements)


def _shards(tensor: Tensor) -> int:
    """Into how many parts ranks share ``tensor``."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = (tensor.device_mesh.size(axis) for axis, each in enumerate(tensor.placements) if not each.is_replicate())
    return math.prod(sizes)


def _shard(parameter: Tensor) -> int:
    """Number of the part of the parameter that this rank has; whole copies have the same, and round alike."""
    number = 0
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            if not placement.is_replicate():
                number = number * parameter.device_mesh.size(axis) + parameter.device_mesh.get_local_rank(axis)
    return number
