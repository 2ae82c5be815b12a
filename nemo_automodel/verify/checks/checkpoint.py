"""A folder's real weights at their real size, one model in memory at a time."""

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_automodel._transformers.tokenizer import load_tokenizer
from nemo_automodel.components.checkpoint import CheckpointError, TensorReader, open_checkpoint
from nemo_automodel.verify.check import Check
from nemo_automodel.verify.checks.end_to_end import greedy_tokens
from nemo_automodel.verify.exact import Exact
from nemo_automodel.verify.outcome import Difference, NotApplicable, Outcome, bitwise, judge
from nemo_automodel.verify.shrink import LENGTH
from nemo_automodel.verify.subject import Subject
from nemo_automodel.verify.target import Target

EXACT_PARAMETERS = 2e8
"""Models below this are run in float64 too: minutes, and eight bytes a parameter, are too much above it."""

LOGITS_MARGIN = 3.0
"""How far from the truth logits may be, in units of the reference's own distance in the same dtype.

Root mean squares: a deep model on real weights has a few outliers that rounding moves by a tenth of all logits, and a
bound on the largest difference would let nonsense pass. Right orders of rounding part by a factor of two here.
"""

SPARE = 1.5
"""What a load takes on the way, and activations, as a factor on the weights."""

TEXT = (
    "The lighthouse keeper wrote down the weather every evening: wind from the west, 12 degrees, rain after nine. "
    "In 1931 his daughter found the books and counted the storms. def storms(log): return sum('storm' in day for day "
    "in log). She was right, and the harbour was built where she said it should be, two miles further up the coast."
)


class _Real(Subject):
    """The same, of the folder's weights; tokens are those of a text where the folder has a tokenizer."""

    @property
    def config(self) -> Any:
        return self.target.config

    @cached_property
    def checkpoint(self) -> Path:
        assert self.target.checkpoint is not None
        return self.target.checkpoint

    @cached_property
    def reader(self) -> TensorReader:
        return open_checkpoint(self.checkpoint, getattr(self.config, "quantization_config", None))

    @cached_property
    def parameters(self) -> int:
        return sum(prod(self.reader.shape(key)) for key in self.reader)

    @cached_property
    def dtype(self) -> torch.dtype:
        """What most tensors are stored in."""
        return Counter(self.reader.dtype(key) for key in self.reader).most_common(1)[0][0]

    def tokens(self, batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
        try:
            words = load_tokenizer(self.checkpoint)(TEXT, add_special_tokens=False)["input_ids"]
        except CheckpointError:
            words = []
        if not words:  # no tokenizer, or an empty one
            return super().tokens(batch, length, seed)
        words = words * (batch * length // len(words) + 1)
        return torch.tensor(words[: batch * length], device=self.device).view(batch, length)


@contextmanager
def _real(subject: Subject, size: int) -> Iterator[_Real]:
    """The folder's own model, where ``size`` bytes a parameter fit into what is free.

    Raises:
        NotApplicable: they do not.
    """
    with _Real(subject.target, subject.device) as real:
        needed, free = real.parameters * size * SPARE, _free_memory(real.device)
        if free is not None and needed > free:
            raise NotApplicable(
                f"{real.parameters / 1e9:.1f}B parameters would take {needed / 2**30:.0f} GiB of memory here, and "
                f"{free / 2**30:.0f} GiB are free"
            )
        yield real


def real_round_trip(subject: Subject) -> Outcome:
    """Loaded, saved and loaded by transformers: each tensor of the folder once, every bit in the folder's dtype."""
    with _real(subject, 4) as real:
        if (free := shutil.disk_usage(real.scratch).free) < real.parameters * real.dtype.itemsize * SPARE:
            raise NotApplicable(f"a copy of the weights does not fit into {real.scratch.parent}: {free:,} bytes free")
        model, folder = real.ours(real.dtype), real.scratch / "saved"
        own = sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(folder)
        del model
        reference, info = real.target.reference_class.from_pretrained(
            folder, dtype=real.dtype, output_loading_info=True
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[kind]:
                return Outcome(
                    False, f"transformers reports {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:4]}"
                )
        if own != (count := sum(parameter.numel() for parameter in reference.parameters())):
            return Outcome(False, f"the implementation has {own:,} parameters, the reference {count:,}")
        state = {real.layout.stored_name(name): tensor for name, tensor in reference.state_dict().items()}
        used = [key for key in real.reader if key in state]
        held = {state[key].data_ptr() for key in used}
        if made_up := [key for key, tensor in state.items() if tensor.data_ptr() not in held]:
            return Outcome(False, f"{made_up[0]} was saved, but the folder has no such tensor ({len(made_up)} such)")
        differences = [bitwise(key, state[key], real.reader.read(key).to(real.dtype)) for key in used]
    unused = len(real.reader) - len(used)
    also = f"; {unused} that the reference does not use either" if unused else ""
    cast = Counter(_name(dtype) for key in used if (dtype := real.reader.dtype(key)) != real.dtype)
    for name, count in cast.items():
        also += f"; {count} stored in {name} and compared in {_name(real.dtype)}"
    return judge(differences, f"{len(used)} tensors, {own:,} parameters, saved and loaded by transformers{also}")


def real_logits(subject: Subject) -> Outcome:
    """Logits of a short text in the folder's dtype and in fp32, beside the reference's own rounding."""
    with _Real(subject.target) as real:
        small = real.parameters < EXACT_PARAMETERS
    with _real(subject, 8 if small else 4) as real:
        _refuse_quantized(real)
        ids = real.tokens()

        @torch.no_grad()
        def logits(load: Any, dtype: torch.dtype) -> Tensor:
            return load(dtype)(ids, use_cache=False).logits.double()

        if small:
            with Exact():
                truth = logits(real.reference, torch.float64)
        else:
            truth = logits(real.reference, torch.float32)
        low = real.dtype if small or real.dtype != torch.float32 else torch.bfloat16
        differences = []
        dtypes = {dtype: _name(dtype) for dtype in (low, torch.float32)}
        for dtype, name in dtypes.items():
            unit = torch.finfo(dtype).eps
            if (
                small or dtype == low
            ):  # else the reference is the truth, and its error as many units as in the low dtype
                units = max(_rms(logits(real.reference, dtype) - truth) / unit, _rms(truth) / 2)
            error = _rms(logits(real.ours, dtype) - truth)
            differences.append(Difference(f"logits in {name}", error, LOGITS_MARGIN * units * unit))
    source = "float64" if small else "the reference in fp32, being too large for float64"
    return judge(differences, f"{ids.numel()} tokens in {' and '.join(dtypes.values())}, against {source}")


def real_greedy_tokens(subject: Subject) -> Outcome:
    """``generate`` gives the reference's tokens in fp32."""
    with _real(subject, 8) as real:
        _refuse_quantized(real)
        return greedy_tokens(real)


CHECKS = [
    Check("real weights", "round trip", real_round_trip),
    Check("real weights", "logits", real_logits),
    Check("real weights", "greedy tokens", real_greedy_tokens),
]


def real_weights(target: Target) -> list[Check]:
    """The checks of ``target``'s checkpoint; one that says why, where there are weights that are not read; or none."""
    if target.checkpoint is not None:
        return CHECKS

    def unread(subject: Subject) -> Outcome:
        raise NotApplicable(target.unread)

    return [Check("real weights", "all", unread)] if target.unread else []


def _name(dtype: torch.dtype) -> str:
    return f"{dtype}".removeprefix("torch.")


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _refuse_quantized(real: _Real) -> None:
    if getattr(real.config, "quantization_config", None):
        raise NotApplicable("the folder is quantized: what transformers makes of it depends on its kernels")


def _free_memory(device: torch.device) -> int | None:
    """Bytes that can be taken without swapping; None where the system does not say."""
    free = []
    if device.type == "cuda":
        free.append(torch.cuda.mem_get_info(device)[0])
    meminfo, limit, current = (
        Path(name) for name in ("/proc/meminfo", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")
    )
    if meminfo.exists():
        available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        free.append(1024 * int(available.split()[1]))
    if limit.exists() and (most := limit.read_text().strip()).isdigit():
        free.append(int(most) - int(current.read_text()))
    return min(free, default=None)
