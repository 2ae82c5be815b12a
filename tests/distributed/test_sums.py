"""Tensor-parallel parameters: terms of whole ones' gradients are added in fp32; what FSDP has cut is not kept whole."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.distributed import Mesh, Options, parallelize, parallelize_tensors
from nemo_automodel.components.models.common.tp_plan import tp_plan_of
from nemo_automodel.components.optim import MasterAdamW, OptimConfig
from tests.conftest import tiny
from tests.distributed.ranks import run_ranks

RANKS = 4
TERMS = torch.tensor([[256.0, 1.0], [1.0, 256.0], [1.0, -1.0], [1.0, 1.0]])
"""Of each rank, for two channels: bf16 has no number between 256 and 258, so that sums in it lose every one."""


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj = _Scale(), nn.Linear(2, RANKS, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def _gradients(sums: bool) -> tuple[list[float], list[float], str]:
    """Of a norm's weight, as the backward pass left it and as the optimizer takes it."""
    model, mesh = nn.Sequential(_Layer()), init_device_mesh("cpu", (RANKS,))
    parallelize_tensors(model, {"0.proj": "colwise"}, mesh, ["_Layer"], sums)
    optimizer = MasterAdamW(model.named_parameters(), OptimConfig(max_grad_norm=None))
    optimizer.accumulating = False
    model(torch.ones(1, RANKS, 2, dtype=torch.bfloat16)).mul(TERMS.bfloat16()).sum().backward()
    left = model[0].norm.weight.grad
    assert isinstance(left, DTensor)
    own = left.to_local().tolist()
    taken: list[Tensor] = []
    optimizer._total_norm = lambda gradients: taken.extend(gradients.values()) or torch.zeros(())  # type: ignore[method-assign,func-returns-value]
    optimizer.step(1e-3)
    assert isinstance(taken[0], DTensor)
    return own, taken[0].to_local().tolist(), str(left.placements[0])


@pytest.mark.ranks
@pytest.mark.parametrize("sums", [False, True])
def test_terms_are_added_in_fp32(sums: bool) -> None:
    exact = TERMS.double().sum(0)
    for rank, (left, taken, placement) in enumerate(run_ranks(RANKS, _gradients, sums)):
        if sums:  # rounded once, to what a gradient of this parameter is in; FSDP adds ranks' in fp32 again
            assert left == taken == exact.bfloat16().tolist()
            assert "Partial" not in placement
        else:
            assert left == TERMS[rank].tolist()
            assert taken == exact.tolist()


def _left_behind() -> list[torch.Size]:
    """Shapes of parameters that are no longer the model's."""
    model = NeMoAutoModelForCausalLM.from_config(tiny(architectures=["LlamaForCausalLM"]), device="cpu")
    parallelize(model, Mesh({"tp": 2, "dp_shard": 2}), Options(tp_plan=tp_plan_of(model)))
    gc.collect()
    own = {id(parameter) for parameter in model.parameters()}
    parameters = (each for each in gc.get_objects() if isinstance(each, nn.Parameter))
    return [each.shape for each in parameters if isinstance(each, DTensor) and id(each) not in own]


@pytest.mark.ranks
def test_what_fsdp_has_sharded_is_not_kept_whole() -> None:
    assert run_ranks(4, _left_behind) == [[]] * 4
