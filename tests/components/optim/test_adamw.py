"""AdamW on masters against torch's own, and the schedule against its formula."""

import copy
import gc
import itertools
import math
import weakref

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
def test_fp32_is_torchs_adamw(max_norm: float | None) -> None:
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
        # four steps of lr = 1e-2, each with some ten roundings of 2^-24, and the norm's sum in another order
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_bf16_keeps_updates_that_bf16_would_lose() -> None:
    """lr 1e-4 on weights of one: each step is below half of bf16's spacing (2^-8), a hundred are not."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("w", parameter)], OptimConfig(lr=1e-4, max_grad_norm=None))
    for _ in range(100):
        parameter.sum().backward()
        optimizer.step(1e-4)
    # with a constant gradient Adam moves by lr a step
    torch.testing.assert_close(optimizer.master("w"), torch.full((4,), 0.99), atol=1e-5, rtol=0)
    assert torch.equal(parameter, optimizer.master("w").bfloat16())


def test_bf16_gradients_add_up_in_fp32() -> None:
    """256 + 1 is 256 in bf16: accumulated there, the later micro-batches would vanish."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("w", parameter)], OptimConfig(max_grad_norm=None))
    for scale in (256.0, 1.0, 1.0):
        (parameter * scale).sum().backward()
    assert parameter.grad is None
    assert optimizer.step(1e-3) == 258.0


def test_a_dropped_optimizer_takes_no_gradients_and_nothing_of_it_stays() -> None:
    """Its hooks stay on the parameters for good, and what they held would, too: weights and moments."""
    model = _model(torch.bfloat16)
    first = MasterAdamW(model.named_parameters(), OptimConfig())
    _backward(model, 0)
    first.step(1e-2)
    dropped = weakref.ref(first)
    del first
    gc.collect()
    assert dropped() is None
    second = MasterAdamW(model.named_parameters(), OptimConfig())
    before = copy.deepcopy(model.state_dict())
    _backward(model, 1)
    assert second.step(1e-2) > 0
    assert not all(map(torch.equal, model.state_dict().values(), before.values()))
    weight = weakref.ref(next(model.parameters()))
    del model, second
    gc.collect()
    assert weight() is None


def test_two_optimizers_of_one_parameter_are_refused() -> None:
    model = _model(torch.bfloat16)
    both = [MasterAdamW(model.named_parameters(), OptimConfig()) for _ in range(2)]
    with pytest.raises(RuntimeError, match="its gradient went to another MasterAdamW of it, which must be dropped"):
        _backward(model, 0)
    assert all(optimizer.accumulating for optimizer in both)


def test_one_gradient_stays_as_it_is() -> None:
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("w", parameter)], OptimConfig())
    optimizer.accumulating = False
    parameter.sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.dtype == torch.bfloat16
    optimizer.step(1e-3)
    assert parameter.grad is None
    assert parameter.ne(0).all()


def test_the_norm_of_bf16_gradients_is_in_fp32() -> None:
    """Rounded to bf16, the norm of each parameter would be off by up to 2^-9."""
    parameters = {str(i): nn.Parameter(torch.zeros(1000 + i, dtype=torch.bfloat16)) for i in range(3)}
    optimizer = MasterAdamW(parameters.items(), OptimConfig())
    optimizer.accumulating = False
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    expected = torch.cat([p.grad.double() for p in parameters.values()]).norm()
    assert optimizer.step(1e-3).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": None}], ids=["clipped", "unclipped"])
def test_after_a_gradient_that_is_not_finite_nothing_is_updated(bad: float, options: dict[str, None]) -> None:
    """Also not by the good gradients of steps that were queued before the host read the norm."""
    model = _model(torch.bfloat16)
    optimizer = MasterAdamW(model.named_parameters(), OptimConfig(**options))
    _backward(model, 0)
    assert optimizer.step(1e-2).isfinite()
    before = copy.deepcopy({**dict(model.named_parameters()), **optimizer.state_tensors()})
    for step in (1, 2):
        _backward(model, step)
        if step == 1:
            optimizer._sums["0.weight"][0, 0] = bad
        assert bool(optimizer.step(1e-2).isfinite()) == (step == 2)
    after = {**dict(model.named_parameters()), **optimizer.state_tensors()}
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.startswith("step."))


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (torch.zeros(2, dtype=torch.float16), r"^w is in torch.float16; AdamW takes"),
        (torch.zeros(4, 2).T, r"^w is a view with strides \(1, 2\)"),
    ],
)
def test_a_parameter_that_cannot_be_updated_is_refused(parameter: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MasterAdamW([("w", nn.Parameter(parameter))], OptimConfig())


def _fill(resumed: MasterAdamW, optimizer: MasterAdamW) -> None:
    with torch.no_grad():
        for own, saved in zip(resumed.state_tensors().values(), optimizer.state_tensors().values(), strict=True):
            own.copy_(saved)


OPTIONS = [
    {"masters": masters, "moments": moments}
    for masters, moments in itertools.product(("exact", "stochastic"), ("float32", "bfloat16"))
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options.values()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_continues_bit_for_bit(dtype: torch.dtype, options: dict[str, str]) -> None:
    config = OptimConfig(lr=1e-2, **options)
    model = _model(dtype)
    optimizer = MasterAdamW(model.named_parameters(), config, seed=3)
    for step in range(3):
        _backward(model, step)
        optimizer.step(1e-2)
    copied = _model(dtype)
    copied.load_state_dict(model.state_dict())
    resumed = MasterAdamW(copied.named_parameters(), config, seed=3)
    _fill(resumed, optimizer)
    torch.rand(3)  # the draws are no matter of torch's generator
    for step in range(3, 6):
        for m, o in ((model, optimizer), (copied, resumed)):
            _backward(m, step)
            o.step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))


@pytest.mark.parametrize(("options", "expected"), list(zip(OPTIONS, (10, 6, 8, 4), strict=True)))
def test_bytes_of_state(options: dict[str, str], expected: int) -> None:
    parameter = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    state = MasterAdamW([("w", parameter)], OptimConfig(**options)).state_tensors()
    del state["step.w"]
    assert sum(tensor.nbytes for tensor in state.values()) == 1000 * expected


def test_a_parameter_without_a_gradient_so_far_resumes_too() -> None:
    parameters = {name: nn.Parameter(torch.ones(2)) for name in ("used", "idle")}
    optimizer = MasterAdamW(parameters.items(), OptimConfig(lr=1e-2))
    parameters["used"].sum().backward()
    optimizer.step(1e-2)
    resumed = MasterAdamW(parameters.items(), OptimConfig(lr=1e-2))
    _fill(resumed, optimizer)
    assert resumed.state_tensors().keys() == optimizer.state_tensors().keys()
    assert [int(resumed.state_tensors()[f"step.{name}"]) for name in parameters] == [1, 0]


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
        *(("masters", "none"), ("moments", "float16")),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: float | str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}={value}"):
        OptimConfig(**{field: value})
