"""On a CUDA device: the AdamW kernel against its reference on the CPU, and a training step that never waits.

Run on a GPU machine with ``pytest -m gpu tests/gpu``.
"""

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.kernels import adamw as kernels
from nemo_automodel.components.kernels.adamw import BLOCK, Hyper, Slot, adamw, adamw_reference
from nemo_automodel.components.kernels.squares import sum_of_squares
from nemo_automodel.components.optim import MasterAdamW, OptimConfig
from nemo_automodel.components.peft import LoRAConfig, apply_lora
from nemo_automodel.config import load_config
from nemo_automodel.recipes.train import TrainConfig, train, train_step
from nemo_automodel.recipes.transfer import Numbers
from tests.components.kernels.test_adamw import BF16, FP32, HYPER, KINDS, bits, slot, state
from tests.components.kernels.test_squares import exact, tensors
from tests.conftest import tiny, tokens
from tests.recipes.conftest import checkpoint, overrides, rows  # noqa: F401  (fixtures)
from tests.recipes.test_train import assert_nan_changes_nothing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")
OPTIONS = list(itertools.product(("exact", "stochastic"), ("float32", "bfloat16")))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within the block an operation that waits for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _on_gpu(one: Slot, offset: int) -> Slot:
    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.cat([value.new_zeros(offset), value]).cuda()[offset:]

    return Slot(**{name: moved(value) for name, value in vars(one).items()})


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_sums_of_squares(offset: int) -> None:
    values = [value.cuda() for dtype in (FP32, BF16, torch.float16) for value in tensors(dtype, 0)]
    values = [torch.cat([value.new_zeros(offset), value])[offset:] for value in values]
    with no_waiting():
        total = sum_of_squares(values)
    torch.testing.assert_close(total, exact(values), rtol=1e-5, atol=0)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(("dtype", "exact", "gradient", "moments"), KINDS)
def test_the_kernel_is_the_reference_bit_for_bit(
    dtype: torch.dtype, exact: bool, gradient: torch.dtype, moments: torch.dtype, offset: int
) -> None:
    """Also what the interpreter could not show: that the compiler fuses and approximates nothing."""
    slots = [
        slot(n, dtype, exact=exact, gradient=gradient, moments=moments, stream=i, step=3 + i, shard=i)
        for i, n in enumerate((1, 7, 0, BLOCK, BLOCK + 1000, 1023, 50 * BLOCK + 17))
    ]
    on_gpu = [_on_gpu(one, offset) for one in slots]
    factor = torch.tensor(0.37)
    adamw(on_gpu, factor.cuda(), HYPER)
    adamw_reference([one for one in slots if one.parameter.numel()], factor, HYPER)
    for one, other in zip(on_gpu, slots, strict=True):
        for actual, right in zip(state(one), state(other), strict=True):
            assert torch.equal(bits(actual.cpu()), bits(right))


def test_parameters_that_are_alike_take_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[int] = []
    launch = kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda slots, *rest: (launches.append(len(slots)), launch(slots, *rest)))
    parameters = {str(i): nn.Parameter(torch.randn(16, 24 + 8 * i, device=CUDA, dtype=BF16)) for i in range(450)}
    optimizer = MasterAdamW(parameters.items(), OptimConfig())
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(1e-3)
    assert launches == [450]


def test_more_elements_than_int32_counts() -> None:
    n = 2**31 + BLOCK + 9
    one = Slot(
        parameter=torch.ones(n, dtype=BF16, device=CUDA),
        gradient=torch.ones(n, dtype=BF16, device=CUDA),
        exp_avg=torch.zeros(n, dtype=BF16, device=CUDA),
        exp_avg_sq=torch.zeros(n, dtype=BF16, device=CUDA),
        low=torch.zeros(n, dtype=torch.int16, device=CUDA),
        step=1,
        weight_decay=0.0,
        stream=0,
    )
    small = copy.deepcopy(Slot(**{k: v[:8].cpu() if isinstance(v, Tensor) else v for k, v in vars(one).items()}))
    adamw([one], torch.ones((), device=CUDA), Hyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8))
    adamw_reference([small], torch.ones(()), Hyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8))
    for tensor, expected in ((one.parameter, small.parameter), (one.low, small.low)):
        assert (tensor == expected[0].item()).all()
    low, high = torch.tensor([0.1]).bfloat16().item() * (1 - 2**-7), 0.1 * (1 + 2**-7)  # one of the two around 0.1
    assert low <= one.exp_avg.amin() <= one.exp_avg.amax() <= high


def _model(lora: bool) -> nn.Module:
    config = tiny(hidden_size=128, head_dim=64, intermediate_size=256)
    model = NeMoAutoModelForCausalLM.from_config(config, dtype="bfloat16", device=CUDA).train()
    if lora:
        apply_lora(model, LoRAConfig(), model.state_dict_adapter.layout)
    return model


def _batches(count: int, seed: int) -> list[dict[str, Tensor]]:
    """As the stream gives them: on the CPU, prompts unlabelled, padded on the right."""
    batches = []
    for i in range(count):
        ids = tokens(2, 32, seed=10 * seed + i)
        mask, labels = torch.ones_like(ids), ids.clone()
        labels[:, :10] = -100
        mask[1, 25:], labels[1, 25:] = 0, -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(("masters", "moments"), OPTIONS)
def test_a_training_step_waits_for_nothing(lora: bool, micro_batches: int, masters: str, moments: str) -> None:
    model = _model(lora)
    optimizer = MasterAdamW(
        ((n, p) for n, p in model.named_parameters() if p.requires_grad),
        OptimConfig(masters=masters, moments=moments),
    )
    train_step(model, optimizer, _batches(micro_batches, 0), 1e-3, CUDA)  # kernels are compiled
    before = {name: value.clone() for name, value in optimizer.parameters.items()}
    torch.cuda.synchronize()
    with no_waiting():
        numbers = Numbers(*train_step(model, optimizer, _batches(micro_batches, 1), 1e-3, CUDA))
    assert all(math.isfinite(number) for number in numbers.read())
    assert any(not torch.equal(value, before[name]) for name, value in optimizer.parameters.items())


def test_state_in_bytes() -> None:
    """What the documentation promises, measured: 14, 10, 12 and 8 bytes with parameter and gradient."""
    n = 2**24
    for (masters, moments), expected in zip(OPTIONS, (14, 10, 12, 8), strict=True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        parameter = nn.Parameter(torch.zeros(n, device=CUDA, dtype=BF16))
        optimizer = MasterAdamW([("w", parameter)], OptimConfig(masters=masters, moments=moments))
        optimizer.accumulating = False
        parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-3)
        used = (torch.cuda.max_memory_allocated() - start) / n
        assert used == pytest.approx(expected, abs=0.1)
        del optimizer, parameter


def test_nan_stops_before_the_weights_change(overrides: Callable[..., list[str]]) -> None:  # noqa: F811
    """The next step, whose gradients are finite, is queued before the host hears of it."""
    assert assert_nan_changes_nothing(overrides(train__max_steps=4)).ahead == 1


@pytest.mark.parametrize(("masters", "moments"), OPTIONS)
def test_it_learns(
    overrides: Callable[..., list[str]],  # noqa: F811
    tmp_path: Path,
    masters: str,
    moments: str,
) -> None:
    words = overrides(optim__masters=masters, optim__moments=moments, model__dtype="bfloat16", train__epochs=6)
    summary = train(load_config(TrainConfig, None, words), say=lambda line: None)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == list(range(1, summary.steps + 1))
    assert summary.loss < 0.7 * logged[0]["loss"]


def test_fp32_weights_on_a_gpu_are_torchs_adamw() -> None:
    ours, theirs = (nn.Parameter(torch.ones(5000, device=CUDA)) for _ in range(2))
    optimizer = MasterAdamW([("w", ours)], OptimConfig(max_grad_norm=None))
    reference = torch.optim.AdamW([theirs], weight_decay=0.0, fused=True)
    for step in range(10):
        gradient = torch.randn(5000, device=CUDA, generator=torch.Generator(CUDA).manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step(1e-3)
        reference.step()
    # a step is lr = 1e-3 with some ten roundings of 2^-24, and one of the weight at 1
    torch.testing.assert_close(ours, theirs, atol=10 * (1e-2 + 1) * 2**-24, rtol=0)
    assert ours.dtype == FP32
