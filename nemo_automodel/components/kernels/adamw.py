"""One AdamW step over many tensors: a single Triton launch for all that are alike, beside the reference that it equals.

A bf16 parameter has 8 bits of mantissa, and an update below 1/512 of its value would vanish. Two ways keep it:

- `split`: the fp32 master is the bf16 parameter plus 16 low-order bits, kept in an int16 tensor. The low bits are the
  signed difference of the two bit patterns, so `join` gives the master back exactly. The parameter is the bf16 number
  nearest to its master; a tie goes away from zero (rounding ties to even would need 65537 differences, one too many).
- `round_randomly`: no master. The parameter is rounded up with just the probability that makes its mean right, by draws
  of Philox (Salmon et al. 2011), a function of seed, parameter, step and element: the same again after a resumption.

Moments in bf16 are rounded randomly too. To the nearest, a second moment would never fall: with beta2 = 0.999 a step
takes 1/1000 off it, less than half of bf16's spacing. One word of 32 bits serves an element, 16 for the parameter, 8
for each moment (a share of the spacing to 1/512): drawing takes longer than moving the bytes.

Kernel and reference do the same operations in the same order, each rounded once (no fused multiply-add), so that they
agree bit for bit. The learning rate and all that derives from it are rounded to fp32 first, in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from nemo_automodel.components.kernels.launch import jit, tl, triton

LANE = 512
"""Elements that one word of each Philox call serves; a block of the kernel is four of them."""
BLOCK = 4 * LANE


@dataclass(frozen=True, kw_only=True)
class Slot:
    """What belongs to one parameter: contiguous plain tensors of one shape.

    Attributes:
        parameter: fp32 or bf16.
        gradient: fp32 or bf16.
        exp_avg, exp_avg_sq: the moments, both fp32 or both bf16.
        low: of a bf16 parameter's master, int16; None: an fp32 parameter, or random rounding.
        step: of this parameter, from 1.
        weight_decay: decoupled.
        stream: number of the parameter: no two draw alike.
        shard: number of the part of the parameter that this is.
    """

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    low: Tensor | None
    step: int
    weight_decay: float
    stream: int
    shard: int = 0


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """What all parameters share; ``seed`` is of the draws."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    seed: int = 0

    def scalars(self, slot: Slot) -> tuple[float, float, float]:
        """What the weight is multiplied with, the step's size, and eps.

        The second moment's correction is taken into the last two: as a division of every root it would cost a fifth
        of the kernel's time.
        """
        decay, root = 1 - self.lr * slot.weight_decay, (1 - self.beta2**slot.step) ** 0.5
        return decay, self.lr / (1 - self.beta1**slot.step) * root, self.eps * root

    def key(self) -> int:
        """The seed as an int64's pattern."""
        return (self.seed + 2**63) % 2**64 - 2**63


def adamw(slots: Sequence[Slot], factor: Tensor, hyper: Hyper) -> None:
    """Update every slot in place, with the gradients times ``factor``; without waiting for the device.

    Args:
        slots: all on one device.
        factor: fp32, one element, on that device. Not a number: nothing at all is changed.
        hyper: learning rate, decays and seed.
    """
    slots = [slot for slot in slots if slot.parameter.numel()]
    if not (factor.is_cuda and triton is not None):
        return adamw_reference(slots, factor, hyper)
    alike: dict[tuple[object, ...], list[Slot]] = {}
    for slot in slots:
        alike.setdefault(_kind(slot), []).append(slot)
    for kind in alike.values():
        launch(kind, factor, hyper)


# --- the reference


def adamw_reference(slots: Sequence[Slot], factor: Tensor, hyper: Hyper) -> None:
    """`adamw` in plain operations, a tensor at a time (waits for the device)."""
    if factor.isnan():
        return
    beta2, rest1, rest2 = (_fp32(x) for x in (hyper.beta2, 1 - hyper.beta1, 1 - hyper.beta2))
    for slot in slots:
        decay, size, eps = (_fp32(x) for x in hyper.scalars(slot))
        weight = slot.parameter.float() if slot.low is None else join(slot.parameter, slot.low)
        gradient, m, v = slot.gradient.float() * factor, slot.exp_avg.float(), slot.exp_avg_sq.float()
        m = m + (gradient - m) * rest1
        v = v * beta2 + (gradient * gradient) * rest2
        # through float64, for torch's fp32 sqrt on a CPU is not always the nearest number
        weight = weight * decay - m / (v.double().sqrt().float() + eps) * size
        if slot.low is not None:
            high, low = split(weight)
            slot.parameter.copy_(high)
            slot.low.copy_(low)
        elif slot.parameter.dtype == torch.bfloat16:
            slot.parameter.copy_(round_randomly(weight, draws(slot, hyper)))
        else:
            slot.parameter.copy_(weight)
        if slot.exp_avg.dtype == torch.bfloat16:
            bits = draws(slot, hyper)
            m, v = round_randomly(m, eight(bits >> 16)), round_randomly(v, eight(bits >> 24))
        slot.exp_avg.copy_(m)
        slot.exp_avg_sq.copy_(v)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> the nearest bf16 (ties away from zero), and the int16 that `join` needs to give ``master`` back."""
    bits, nan = master.view(torch.int32), master.isnan()
    high = torch.where(nan, (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
    low = torch.where(nan, 0, bits - (high << 16))
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The inverse of `split`."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def round_randomly(values: Tensor, draws: Tensor) -> Tensor:
    """fp32 -> one of the two bf16 around it, the nearer the likelier: its mean is the value.

    Args:
        values: finite or not.
        draws: int32 or int64 of the same shape, whose low 16 bits are uniform.
    """
    bits, nan = values.view(torch.int32), values.isnan()
    high = torch.where(nan, (bits >> 16) | 0x40, (bits + (draws & 0xFFFF).to(torch.int32)) >> 16)
    return high.to(torch.int16).view(torch.bfloat16)


def eight(draws: Tensor) -> Tensor:
    """The low 8 bits as 16, in the middle of what 8 bits leave open."""
    return (draws & 0xFF) << 8 | 0x80


def draws(slot: Slot, hyper: Hyper) -> Tensor:
    """32 uniform bits for each element, as int64."""
    blocks = -(-slot.parameter.numel() // BLOCK)
    group = torch.arange(blocks * LANE, device=slot.parameter.device)
    words = _philox((group, slot.stream, slot.step, slot.shard), hyper.key())
    return (
        torch.stack([word.view(blocks, LANE) for word in words], dim=1)
        .flatten()[: slot.parameter.numel()]
        .view(slot.parameter.shape)
    )


def _philox(counter: tuple[Tensor, int, int, int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32 bits each; a product of two wraps, with the right 64 bits."""
    c0, c1, c2, c3 = (torch.as_tensor(c, device=counter[0].device) for c in counter)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = (b >> 32 & 0xFFFFFFFF) ^ c1 ^ k0, (a >> 32 & 0xFFFFFFFF) ^ c3 ^ k1
        c1, c3 = b & 0xFFFFFFFF, a & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


def _fp32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


# --- the kernel. Half-precision tensors are read and written as int16: bf16 is the upper half of fp32's pattern.
#
# A row of TABLE: addresses of parameter, gradient, moments and low bits (0-4), elements (5), first block (6), seed (7),
# stream (8), step (9), shard (10). A row of SCALARS: `Hyper.scalars`. OWNERS: each block's row.
_COLUMNS, _SCALARS = 11, 3


def launch(slots: Sequence[Slot], factor: Tensor, hyper: Hyper) -> None:
    """`adamw` of slots that are alike (dtypes, alignment), none of them empty, in one launch."""
    first = slots[0]
    blocks = [-(-slot.parameter.numel() // BLOCK) for slot in slots]
    starts = [0, *accumulate(blocks)]
    rows = [
        [
            *(0 if tensor is None else tensor.data_ptr() for tensor in _tensors(slot)),
            *(slot.parameter.numel(), start, hyper.key(), slot.stream, slot.step, slot.shard),
        ]
        for slot, start in zip(slots, starts, strict=False)
    ]
    table = queued(torch.tensor(rows, dtype=torch.int64), factor.device)
    scalars = queued(torch.tensor([hyper.scalars(slot) for slot in slots], dtype=torch.float32), factor.device)
    with torch.cuda.device(factor.device if factor.is_cuda else -1):
        adamw_kernel[(starts[-1],)](
            table,
            scalars,
            owners_of(tuple(blocks), factor.device),
            factor,
            *(hyper.beta2, 1 - hyper.beta1, 1 - hyper.beta2),
            HALF=first.parameter.dtype == torch.bfloat16,
            LOW=first.low is not None,
            HALF_GRADIENT=first.gradient.dtype == torch.bfloat16,
            HALF_MOMENTS=first.exp_avg.dtype == torch.bfloat16,
            ALIGNED=_aligned(first),
            COLUMNS=_COLUMNS,
            SCALARS_COLUMNS=_SCALARS,
            LANE=LANE,
            num_warps=4,  # four elements a thread: fp32 in 16 bytes, and 60 to 90 registers
            enable_fp_fusion=False,  # bit for bit the reference
        )


def _tensors(slot: Slot) -> tuple[Tensor | None, ...]:
    return slot.parameter, slot.gradient, slot.exp_avg, slot.exp_avg_sq, slot.low


def _aligned(slot: Slot) -> bool:
    """Whether 16 bytes can be read at a time: a view may start anywhere."""
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in _tensors(slot))


def _kind(slot: Slot) -> tuple[object, ...]:
    return *(None if tensor is None else tensor.dtype for tensor in _tensors(slot)), _aligned(slot)


@lru_cache(maxsize=16)  # the same in every step; 4 bytes per block
def owners_of(blocks: tuple[int, ...], device: torch.device) -> Tensor:
    owners = torch.repeat_interleave(torch.arange(len(blocks), dtype=torch.int32), torch.tensor(blocks))
    return queued(owners, device)


def queued(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for: its pinned memory is given out again only once it is done."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@jit
def adamw_kernel(  # type: ignore[no-untyped-def]
    TABLE,
    SCALARS,
    OWNERS,
    FACTOR,
    beta2,
    rest1,
    rest2,
    HALF: tl.constexpr,
    LOW: tl.constexpr,
    HALF_GRADIENT: tl.constexpr,
    HALF_MOMENTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALARS_COLUMNS: tl.constexpr,
    LANE: tl.constexpr,
):
    factor = tl.load(FACTOR)
    if factor == factor:  # a number
        block = tl.program_id(0)
        owner = tl.load(OWNERS + block)
        row, scalars = TABLE + owner * COLUMNS, SCALARS + owner * SCALARS_COLUMNS
        at = (block - tl.load(row + 6)) * (4 * LANE)  # int64
        parameter = pointer_to(tl.load(row), HALF, ALIGNED) + at
        gradient = pointer_to(tl.load(row + 1), HALF_GRADIENT, ALIGNED) + at
        m = pointer_to(tl.load(row + 2), HALF_MOMENTS, ALIGNED) + at
        v = pointer_to(tl.load(row + 3), HALF_MOMENTS, ALIGNED) + at
        low = pointer_to(tl.load(row + 4), True, ALIGNED) + at
        pointers = (parameter, gradient, m, v, low)
        decay, size, eps = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
        numbers = (factor, decay, size, eps, beta2, rest1, rest2)
        left = tl.load(row + 5) - at

        group = ((at // 4).to(tl.uint32)) + tl.arange(0, LANE).to(tl.uint32)
        seed, stream, step = tl.load(row + 7), tl.load(row + 8).to(tl.uint32), tl.load(row + 9).to(tl.uint32)
        shard = tl.load(row + 10).to(tl.uint32)
        d0, d1, d2, d3 = group, group, group, group
        if HALF_MOMENTS or (HALF and not LOW):
            d0, d1, d2, d3 = tl.philox(seed, group, stream, step, shard)
        if left >= 4 * LANE:  # no mask: 16 bytes at a time
            _lane(pointers, numbers, 0, left, d0, HALF, LOW, HALF_GRADIENT, HALF_MOMENTS, False, LANE)
            _lane(pointers, numbers, 1, left, d1, HALF, LOW, HALF_GRADIENT, HALF_MOMENTS, False, LANE)
            _lane(pointers, numbers, 2, left, d2, HALF, LOW, HALF_GRADIENT, HALF_MOMENTS, False, LANE)
            _lane(pointers, numbers, 3, left, d3, HALF, LOW, HALF_GRADIENT, HALF_MOMENTS, False, LANE)
        else:
            _lane(pointers, numbers, 0, left, d0, HALF, LOW, HALF_GRADIENT, HALF_MOMENTS, True, LANE)
            _lane(pointers, numbers, 1, left, d1, HALF, LOW, HALF_GRADIENT, HALF_MOMENTS, True, LANE)
            _lane(pointers, numbers, 2, left, d2, HALF, LOW, HALF_GRADIENT, HALF_MOMENTS, True, LANE)
            _lane(pointers, numbers, 3, left, d3, HALF, LOW, HALF_GRADIENT, HALF_MOMENTS, True, LANE)


@jit
def _lane(  # type: ignore[no-untyped-def]
    pointers,
    numbers,
    number: tl.constexpr,
    left,
    draws,
    HALF: tl.constexpr,
    LOW: tl.constexpr,
    HALF_GRADIENT: tl.constexpr,
    HALF_MOMENTS: tl.constexpr,
    MASKED: tl.constexpr,
    LANE: tl.constexpr,
):
    factor, decay, size, eps, beta2, rest1, rest2 = numbers
    at = number * LANE + tl.arange(0, LANE)
    weight = load_as_float(pointers[0], at, left, HALF, MASKED)
    gradient = load_as_float(pointers[1], at, left, HALF_GRADIENT, MASKED) * factor
    m = load_as_float(pointers[2], at, left, HALF_MOMENTS, MASKED)
    v = load_as_float(pointers[3], at, left, HALF_MOMENTS, MASKED)
    if LOW:
        bits = weight.to(tl.int32, bitcast=True) + _read(pointers[4], at, left, MASKED).to(tl.int32)
        weight = bits.to(tl.float32, bitcast=True)
    m = m + (gradient - m) * rest1
    v = v * beta2 + (gradient * gradient) * rest2
    weight = weight * decay - tl.div_rn(m, tl.sqrt_rn(v) + eps) * size
    if LOW:
        bits = weight.to(tl.int32, bitcast=True)
        high = tl.where(weight == weight, (bits + 0x8000) >> 16, (bits >> 16) | 0x40)
        _write(pointers[0], at, left, high.to(tl.int16), MASKED)
        rest = tl.where(weight == weight, bits - (high << 16), 0)
        _write(pointers[4], at, left, rest.to(tl.int16), MASKED)
    else:
        _store(pointers[0], at, left, weight, draws, HALF, MASKED)
    _store(pointers[2], at, left, m, (draws >> 8) & 0xFF00 | 0x80, HALF_MOMENTS, MASKED)
    _store(pointers[3], at, left, v, (draws >> 16) & 0xFF00 | 0x80, HALF_MOMENTS, MASKED)


@jit
def pointer_to(address, HALF: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    pointer = address.to(tl.pointer_type(tl.int16 if HALF else tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit
def _read(pointer, at, left, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    if MASKED:
        return tl.load(pointer + at, mask=at < left, other=0)
    return tl.load(pointer + at)


@jit
def _write(pointer, at, left, values, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    if MASKED:
        tl.store(pointer + at, values, mask=at < left)
    else:
        tl.store(pointer + at, values)


@jit
def load_as_float(pointer, at, left, HALF: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    values = _read(pointer, at, left, MASKED)
    if HALF:
        values = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values


@jit
def _store(pointer, at, left, values, draws, HALF: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    if HALF:  # rounded randomly
        bits = values.to(tl.int32, bitcast=True)
        up = (draws & 0xFFFF).to(tl.int32)
        high = tl.where(values == values, (bits + up) >> 16, (bits >> 16) | 0x40)
        _write(pointer, at, left, high.to(tl.int16), MASKED)
    else:
        _write(pointer, at, left, values, MASKED)
