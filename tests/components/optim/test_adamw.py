"""AdamW on masters against torch's own, and the schedule against its formula."""

import itertools
import math

import pytest
import torch
from torch import nn

from nemo_automodel.components.optim import MasterAdamW, OptimConfig


def _model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


def _backward(model: nn.Module, step: int) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
    model(x).square().sum().backward()


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_fp32_is_torchs_adamw_bit_for_bit(max_norm: float | None) -> None:
    model, reference = _model(torch.float32), _model(torch.float32)
    ours = MasterAdamW(model.named_parameters(), OptimConfig(lr=1e-2, weight_decay=0.1, max_grad_norm=max_norm))
    matrices = [p for p in reference.parameters() if p.ndim > 1]
    vectors = [p for p in reference.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    for step in range(4):
        _backward(model, step)
        _backward(reference, step)
        norm = ours.step(1e-2)
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm or math.inf)
        theirs.step()
        theirs.zero_grad()
        assert norm == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)  # the norm's sum may run in another order


def test_bf16_keeps_updates_that_bf16_would_lose() -> None:
    """lr 1e-4 on weights of one: each step is below half of bf16's spacing (2^-8), a hundred are not."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("w", parameter)], OptimConfig(lr=1e-4, max_grad_norm=None))
    for _ in range(100):
        parameter.sum().backward()
        optimizer.step(1e-4)
    # with a constant gradient Adam moves by lr a step
    torch.testing.assert_close(optimizer.masters["w"], torch.full((4,), 0.99), atol=1e-5, rtol=0)
    assert torch.equal(parameter, optimizer.masters["w"].bfloat16())


def test_bf16_gradients_add_up_in_fp32() -> None:
    """256 + 1 is 256 in bf16: accumulated there, the later micro-batches would vanish."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("w", parameter)], OptimConfig(max_grad_norm=None))
    for scale in (256.0, 1.0, 1.0):
        (parameter * scale).sum().backward()
    assert parameter.grad is None
    assert optimizer.step(1e-3) == 258.0


def test_a_gradient_that_is_not_finite_updates_nothing() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = MasterAdamW([("w", parameter)], OptimConfig())
    (parameter * torch.tensor([1.0, float("inf")])).sum().backward()
    with pytest.raises(FloatingPointError, match="norm is inf"):
        optimizer.step(1.0)
    assert torch.equal(parameter, torch.ones(2))


def _fill(resumed: MasterAdamW, optimizer: MasterAdamW) -> None:
    with torch.no_grad():
        for own, saved in zip(resumed.state_tensors().values(), optimizer.state_tensors().values(), strict=True):
            own.copy_(saved)
    resumed.state_was_loaded()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_continues_bit_for_bit(dtype: torch.dtype) -> None:
    model = _model(dtype)
    optimizer = MasterAdamW(model.named_parameters(), OptimConfig(lr=1e-2))
    for step in range(3):
        _backward(model, step)
        optimizer.step(1e-2)
    copy = _model(dtype)
    copy.load_state_dict(model.state_dict())
    resumed = MasterAdamW(copy.named_parameters(), OptimConfig(lr=1e-2))
    _fill(resumed, optimizer)
    for step in range(3, 6):
        for m, o in ((model, optimizer), (copy, resumed)):
            _backward(m, step)
            o.step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))


def test_a_parameter_without_a_gradient_so_far_resumes_too() -> None:
    parameters = {name: nn.Parameter(torch.ones(2)) for name in ("used", "idle")}
    optimizer = MasterAdamW(parameters.items(), OptimConfig(lr=1e-2))
    parameters["used"].sum().backward()
    optimizer.step(1e-2)
    resumed = MasterAdamW(parameters.items(), OptimConfig(lr=1e-2))
    _fill(resumed, optimizer)
    assert resumed.state_tensors().keys() == optimizer.state_tensors().keys()
    assert resumed.state_tensors()["step.idle"] == 0


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_schedule(schedule: str, middle: float, end: float) -> None:
    config = OptimConfig(lr=1.0, warmup_steps=3, min_lr_ratio=0.1, schedule=schedule)
    at = [config.lr_at(step, 14) for step in range(14)]
    assert at[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert (at[8], at[13]) == pytest.approx((middle, end))
    assert all(a >= b for a, b in itertools.pairwise(at[3:]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("lr", 0.0), ("lr", float("nan")), ("beta1", 1.0), ("beta2", -0.1), ("eps", -1e-8)),
        *(("warmup_steps", -1), ("min_lr_ratio", 1.5), ("max_grad_norm", 0.0), ("weight_decay", -1.0)),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{field}={value}"):
        OptimConfig(**{field: value})
