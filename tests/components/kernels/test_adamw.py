"""One AdamW step: the reference against float64 and exact masters, the kernel (interpreted) against the reference."""

import copy
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from nemo_automodel.components.kernels import adamw as kernels
from nemo_automodel.components.kernels.adamw import BLOCK, Hyper, Slot, adamw, adamw_reference, draws, join, split
from nemo_automodel.components.kernels.launch import INTERPRETED, triton

BF16, FP32 = torch.bfloat16, torch.float32
HYPER = Hyper(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, seed=5)
ONE = torch.tensor(1.0)


def slot(n: int, dtype: torch.dtype = BF16, *, exact: bool = True, offset: int = 0, **changes: object) -> Slot:
    """Random values; ``offset`` elements into memory of their own."""
    gradient, moments = changes.pop("gradient", dtype), changes.pop("moments", FP32)

    def values(dtype: torch.dtype) -> Tensor:
        return (torch.randn(n + offset) * 0.1).to(dtype)[offset:]

    low = torch.randint(-(2**15), 2**15, (n + offset,)).to(torch.int16)[offset:] if dtype == BF16 and exact else None
    return Slot(
        parameter=values(dtype),
        gradient=values(gradient),
        exp_avg=values(moments),
        exp_avg_sq=values(moments).square(),
        low=low,
        **{"step": 3, "weight_decay": 0.1, "stream": 1, **changes},
    )


def state(one: Slot) -> list[Tensor]:
    return [t for t in (one.parameter, one.exp_avg, one.exp_avg_sq, one.low) if t is not None]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def test_a_master_is_its_nearest_bf16_and_16_bits() -> None:
    patterns = torch.randint(-(2**31), 2**31, (1_000_000,)).to(torch.int32)
    special = [0.0, -0.0, 1.0, 1e-45, -1e-45, math.inf, -math.inf, torch.finfo(FP32).max, 1 + 2**-8, 1 + 3 * 2**-8]
    masters = torch.cat([patterns.view(FP32), torch.tensor(special)])
    masters = masters[~masters.isnan()]
    high, low = split(masters)
    assert torch.equal(bits(join(high, low)), bits(masters))
    tie = low == -(2**15)
    assert torch.equal(bits(high)[~tie], bits(masters.bfloat16())[~tie])
    assert high[tie].abs().ge(masters[tie].abs()).all()
    assert tie[-2:].all()  # away from zero, where bf16() goes to even: down and up

    nan = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(FP32)
    high, low = split(nan)
    assert high.isnan().all()
    assert join(high, low).isnan().all()


@pytest.mark.parametrize("gradient", [BF16, FP32])
def test_exact_masters_take_the_trajectory_of_fp32_weights_bit_for_bit(gradient: torch.dtype) -> None:
    low = slot(5000, gradient=gradient, exact=True)
    full = copy.deepcopy(low)
    full = Slot(**{**vars(full), "parameter": join(low.parameter, low.low), "low": None})
    for step in range(1, 60):
        new = torch.randn(5000).to(gradient)
        for one in (low, full):
            one.gradient.copy_(new)
            adamw_reference([Slot(**{**vars(one), "step": step})], ONE, HYPER)
    assert torch.equal(bits(join(low.parameter, low.low)), bits(full.parameter))
    assert torch.equal(low.parameter, split(full.parameter)[0])


def test_the_reference_is_torchs_adamw_in_float64() -> None:
    one = slot(2000, FP32)
    one.exp_avg.zero_()
    one.exp_avg_sq.zero_()
    theirs = torch.nn.Parameter(one.parameter.double())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for step in range(1, 21):
        one.gradient.copy_(torch.randn(2000))
        theirs.grad = 0.5 * one.gradient.double()
        optimizer.step()
        adamw_reference([Slot(**{**vars(one), "step": step})], torch.tensor(0.5), HYPER)
    # a step moves a weight by about lr, with some ten roundings of 2^-24; and the weight is rounded, at below 1
    bound = 20 * (10 * 1e-2 + 1) * 2**-24
    torch.testing.assert_close(one.parameter.double(), theirs.detach(), atol=bound, rtol=0)


def test_the_draws_are_philox() -> None:
    """The known answers of Random123, the authors' own code."""
    known = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for (c0, *others), key, expected in known:
        words = kernels._philox((torch.tensor([c0]), *others), key)
        assert tuple(int(word) for word in words) == expected


def test_no_two_draws_are_alike() -> None:
    one = slot(2 * BLOCK + 3)
    others = [Slot(**{**vars(one), **change}) for change in ({}, {"step": 4}, {"stream": 2}, {"shard": 1})]
    words = [draws(other, HYPER) for other in others]
    words.append(draws(one, Hyper(**{**vars(HYPER), "seed": 6})))
    assert torch.cat(words).unique().numel() > 0.999 * sum(
        word.numel() for word in words
    )  # of 2^32: 1e5^2 / 2^33 pairs
    assert torch.equal(draws(one, HYPER), words[0])


def test_random_rounding_is_right_on_average() -> None:
    n = 400_000
    one = slot(n, exact=False)
    share = 0.3
    value = torch.full((n,), -1.0 - share * 2**-7)
    up = (kernels.round_randomly(value, draws(one, HYPER)) != -1.0).float()
    assert set(kernels.round_randomly(value, draws(one, HYPER)).tolist()) == {-1.0, -1.0 - 2**-7}
    sigma = math.sqrt(share * (1 - share) / n)
    assert abs(up.mean().item() - share) < 5 * sigma + 2**-16  # the last: 16 bits of share
    assert torch.equal(kernels.round_randomly(value.bfloat16().float(), draws(one, HYPER)), value.bfloat16())


def test_a_bf16_second_moment_falls() -> None:
    """beta2 = 0.999, no gradient: to the nearest it would stay for ever."""
    one = slot(100_000, moments=BF16, stream=0)
    one.gradient.zero_()
    one.exp_avg_sq.fill_(1.0)
    assert (one.exp_avg_sq * 0.999).eq(1.0).all()
    for step in range(1, 201):
        adamw_reference([Slot(**{**vars(one), "step": step})], ONE, HYPER)
    expected = 0.999**200
    # each step adds an error of at most half a spacing's spread: 2^-9 of a value below 1, independent
    bound = 5 * 2**-9 * math.sqrt(200 / 100_000)
    assert one.exp_avg_sq.float().mean().item() == pytest.approx(expected, abs=bound)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "stochastic"])
def test_a_bf16_parameter_moves_by_less_than_its_spacing(exact: bool) -> None:
    """Weights of one move down by lr = 1e-5 a step, bf16's spacing there is 2^-8."""
    n, hyper = 100_000, Hyper(lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8)
    one = slot(n, exact=exact, weight_decay=0.0)
    for tensor, value in zip(state(one), (1.0, 1.0, 1.0, 0), strict=False):
        tensor.fill_(value)
    one.gradient.fill_(1.0)
    for step in range(1, 101):
        adamw_reference([Slot(**{**vars(one), "step": 10**6 + step})], ONE, hyper)
    master = join(one.parameter, one.low) if one.low is not None else one.parameter.float()
    bound = 100 * 2**-24 if exact else 5 * 2**-9 * math.sqrt(100 / n)
    assert master.mean(dtype=torch.float64).item() == pytest.approx(1 - 100 * 1e-5, abs=bound)
    assert bound < 0.5 * 100 * 1e-5


@pytest.mark.parametrize("exact", [True, False])
def test_without_a_factor_nothing_changes(exact: bool) -> None:
    one = slot(10, exact=exact)
    before = copy.deepcopy(one)
    one.gradient[3] = math.nan
    adamw([one], torch.tensor(math.nan), HYPER)
    assert all(torch.equal(a, b) for a, b in zip(state(one), state(before), strict=True))


# --- the kernel, interpreted: in a process of its own, for Triton decides when it is imported


@pytest.mark.skipif(triton is None or INTERPRETED, reason="runs the tests below where triton is, once")
def test_interpreted() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "the_kernel",
    ]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


interpreted = pytest.mark.skipif(not INTERPRETED, reason="by `test_interpreted`")
KINDS = [
    pytest.param(dtype, exact, gradient, moments, id=f"{dtype} {exact} {gradient} {moments}".replace("torch.", ""))
    for (dtype, exact), gradient, moments in itertools.product(
        [(BF16, True), (BF16, False), (FP32, False)], [BF16, FP32], [BF16, FP32]
    )
]


@interpreted
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(("dtype", "exact", "gradient", "moments"), KINDS)
def test_the_kernel_is_the_reference_bit_for_bit(
    dtype: torch.dtype, exact: bool, gradient: torch.dtype, moments: torch.dtype, offset: int
) -> None:
    slots = [
        slot(n, dtype, exact=exact, offset=offset, gradient=gradient, moments=moments, stream=i, step=3 + i, shard=i)
        for i, n in enumerate((1, 7, BLOCK, BLOCK + 1000, 1023))
    ]
    expected = copy.deepcopy(slots)
    kernels.launch(slots, torch.tensor(0.37), HYPER)
    adamw_reference(expected, torch.tensor(0.37), HYPER)
    for one, other in zip(slots, expected, strict=True):
        for actual, right in zip(state(one), state(other), strict=True):
            assert torch.equal(bits(actual), bits(right))


@interpreted
def test_the_kernel_leaves_what_lies_around_alone() -> None:
    whole = torch.zeros(BLOCK + 30)
    one = slot(BLOCK + 9, FP32, exact=False)
    one = Slot(**{**vars(one), "parameter": whole[10 : BLOCK + 19]})
    kernels.launch([one], ONE, HYPER)
    assert whole[10 : BLOCK + 19].ne(0).all()
    assert whole[:10].eq(0).all()
    assert whole[BLOCK + 19 :].eq(0).all()


@interpreted
@pytest.mark.parametrize("exact", [True, False])
def test_the_kernel_changes_nothing_without_a_factor(exact: bool) -> None:
    one = slot(BLOCK + 5, exact=exact, moments=BF16)
    before = copy.deepcopy(one)
    kernels.launch([one], torch.tensor(math.nan), HYPER)
    assert all(torch.equal(a, b) for a, b in zip(state(one), state(before), strict=True))
