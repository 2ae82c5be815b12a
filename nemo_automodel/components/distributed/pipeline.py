"""Pipeline parallelism: stages of a model on several ranks, run by torch's schedules."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from nemo_automodel.components.distributed.mesh import Mesh
from nemo_automodel.components.distributed.stages import SINGLE, ZERO_BUBBLE
from nemo_automodel.components.together import Together

Compute = Callable[[nn.Module, Mapping[str, Any]], Tensor]
"""A stage and its micro-batch, with hidden states where ids would be, -> hidden states, or the loss of the last."""

_FORWARD = ("F", "SEND_F", "RECV_F", "UNSHARD", "RESHARD")
"""torch's actions of a schedule that have nothing to do with gradients."""


class _Stage(PipelineStage):
    """A stage that computes a micro-batch which all ranks have, known by its number.

    torch would split a whole batch's tensors by rows, and give on what each stage returns.
    """

    batches: Sequence[Mapping[str, Any]]
    compute: Compute

    @property
    def part(self) -> nn.Module:
        """The model's."""
        return self.submod.part if isinstance(self.submod, _Unnoticed) else self.submod

    def forward_maybe_with_nosync(self, *inputs: Tensor, number: Tensor) -> Tensor:
        batch = self.batches[int(number)]
        output = self.compute(self.part, {**batch, "input_ids": inputs[0]} if inputs else batch)
        # torch detaches it in place once its gradient has gone back, which views do not let happen
        return output.clone() if output._is_view() else output

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: Any, last_backward: bool = False) -> Any:
        if isinstance(self.submod, _Unnoticed):  # FSDP would forget what other micro-batches' forward passes gathered
            self.submod.part.set_is_last_backward(last_backward)
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)
        for parameter in self.submod.parameters():  # whose gradients torch set without autograd, which calls the hooks
            _call_hooks(parameter)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # torch 2.11 would open a connection to this rank too, where it has the neighbour
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


class _Unnoticed(nn.Module):
    """A sharded part that torch's stage takes for a plain one: FSDP gathers and reduces as it does without stages.

    Where torch's stage sees FSDP, whole weights and gradients of all layers wait for the last micro-batch.
    """

    def __init__(self, part: FSDPModule):
        super().__init__()
        self.part: Any = part


class Pipeline:
    """A model whose stages lie on the ranks of a mesh's axis ``pp``.

    Args:
        parts: stage number -> this rank's part of the model, as `keep_stage` left it, whole or sharded.
        stages: how many there are on all ranks.
        mesh: of all ranks.
        schedule: a `ScheduleName`.
        compute: what a stage does.
        reduces_each: whether FSDP reduces gradients with every micro-batch, and not only with a step's last.

    Attributes:
        parts: of this rank, the first stage's first.
        parameters: the trained ones of all parts, by the names under which they are saved.
        shared: of those that another rank has too, name -> the ranks that have it.
    """

    def __init__(
        self,
        parts: Mapping[int, nn.Module],
        stages: int,
        mesh: Mesh,
        schedule: str,
        compute: Compute,
        reduces_each: bool = False,
    ):
        axis = mesh.axis("pp")
        assert axis is not None
        self.parts = list(parts.values())
        self._numbers, self._stages, self._group = list(parts), stages, axis.get_group()
        self._schedule, self._compute, self._reduces_each = schedule, compute, reduces_each
        self._device = torch.device(mesh.device_type)
        if mesh.device_type == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device())
        # of one shape at a time: stages hold room for what is received of each micro-batch, and lengths may be many
        self._ready: dict[bool, tuple[tuple[int, ...], tuple[list[_Stage], Any]]] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []
        for part in self.parts:
            for name, parameter in part.named_parameters():
                name = saved_name(part, name)
                if name in self.parameters:
                    self._copies.append((self.parameters[name], parameter))
                    parameter.register_post_accumulate_grad_hook(_handing_over(self.parameters[name]))
                elif parameter.requires_grad:
                    self.parameters[name] = parameter
        tied = {name for part in self.parts for name in getattr(part, "split_ties", {}).values()}
        tied &= self.parameters.keys()
        # no ranks in between know of ties, and all make the groups together; both ends of a V are on one rank
        apart = Together().any(bool(tied)) and schedule != "ZBVZeroBubble"
        ends = _ends(mesh) if apart else None
        self.shared = {name: ends for name in tied if ends is not None}

    def train_step(self, batches: Sequence[Mapping[str, Any]], factor: float) -> Tensor:
        """Forward and backward passes of all micro-batches; gradients are of the losses times ``factor``.

        Args:
            batches: of a step, all of one shape, each with ``input_ids`` ``[B, S]``; the same on all of its stages.
            factor: of the losses.

        Returns:
            The sum of the losses times ``factor``; zero where the last stage is not.
        """
        with self._gathered():
            return self._run(batches, factor, train=True)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Mapping[str, Any]]) -> Tensor:
        """The sum of the losses; zero where the last stage is not."""
        return self._run(batches, 1.0, train=False)

    def _run(self, batches: Sequence[Mapping[str, Any]], factor: float, train: bool) -> Tensor:
        with torch.no_grad():
            for one, other in self._copies:
                other.copy_(one)
        count, (rows, length) = len(batches), batches[0]["input_ids"].shape
        if train not in self._ready or self._ready[train][0] != (count, rows, length):
            self._ready.pop(train, None)
            self._ready[train] = (count, rows, length), self._prepare(count, rows, length, train)
        stages, schedule = self._ready[train][1]
        for stage in stages:
            stage.batches = batches
        losses: list[Tensor] = []
        numbers, factors = torch.arange(len(batches)), torch.full((len(batches),), factor)
        run = schedule.step if train else schedule.eval
        run(number=numbers, target=factors, losses=losses, return_outputs=False)
        total = torch.zeros((), device=self._device)
        for loss in losses:
            total += loss.detach()
        return total

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Where weights' gradients wait for their turn, FSDP must not take the weights away in between."""
        sharded = [part for part in self.parts if isinstance(part, FSDPModule) and self._schedule in ZERO_BUBBLE]
        for part in sharded:
            part.set_reshard_after_forward(False)
        yield
        for part in sharded:
            part.set_reshard_after_forward(True)

    def _prepare(self, count: int, rows: int, length: int, train: bool) -> tuple[list[_Stage], Any]:
        """torch's stages and schedule for micro-batches of this shape, which their buffers have."""
        config: Any = self.parts[0].config
        dtype: Any = self.parts[0].dtype
        hidden = torch.empty(rows, length, config.hidden_size, dtype=dtype, device="meta", requires_grad=train)
        loss = torch.empty((), device="meta", requires_grad=train)
        stages = []
        for number, part in zip(self._numbers, self.parts, strict=True):
            stage = _Stage(
                _Unnoticed(part) if self._reduces_each and isinstance(part, FSDPModule) else part,
                number,
                self._stages,
                self._device,
                input_args=() if number == 0 else (hidden,),
                output_args=(loss if number == self._stages - 1 else hidden,),
                group=self._group,
            )
            stage.compute = self._compute
            stages.append(stage)
        schedule = get_schedule_class(self._schedule)(
            stages[0] if self._schedule in SINGLE else stages,  # type: ignore[arg-type]
            n_microbatches=count,
            loss_fn=lambda loss, factor: loss * factor[0],
            scale_grads=False,
        )
        if not train and self._schedule not in SINGLE:  # torch's eval looks for gradients between stages of one rank
            schedule.pipeline_order_with_comms = {
                rank: [action for action in actions if action.computation_type.value in _FORWARD]
                for rank, actions in schedule.pipeline_order_with_comms.items()
            }
        return stages, schedule


def _call_hooks(parameter: Tensor) -> None:
    hooks: Mapping[int, Callable[[Tensor], None]] = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    for hook in hooks.values() if parameter.grad is not None else ():
        hook(parameter)


def _handing_over(one: nn.Parameter) -> Callable[[Tensor], None]:
    """A hook that adds a copy's gradient to that of ``one``, a tied parameter of another stage of this rank."""

    def hand_over(copy: Tensor) -> None:
        assert copy.grad is not None
        one.grad = copy.grad if one.grad is None else one.grad + copy.grad
        copy.grad = None
        _call_hooks(one)

    return hand_over


def saved_name(part: nn.Module, name: str) -> str:
    """The name under which a checkpoint has the parameter ``name`` of a stage: of tied ones, the first's."""
    return getattr(part, "split_ties", {}).get(name, name)


def _ends(mesh: Mesh) -> dist.ProcessGroup | None:
    """This rank and the one at the pipeline's other end, which is at the same place among its stage's ranks."""
    ends = [[place, mesh.size - mesh.stage + place] for place in range(mesh.stage)]
    return dist.new_subgroups_by_enumeration(ends)[0]
