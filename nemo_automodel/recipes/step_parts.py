"""Where the time of a training step goes: by part of the step, and by kind of kernel."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

FORWARD, LOSS, BACKWARD, OPTIMIZER, OTHER = "forward", "head and loss", "backward", "optimizer", "other"
PARTS = (FORWARD, LOSS, BACKWARD, OPTIMIZER, OTHER)

KINDS: tuple[tuple[str, str], ...] = (
    ("compiled (Inductor)", r"triton_(poi|red|per|for)_|cpp_fused|compiledfxgraph"),  # its names list what it fused
    ("attention", r"flash|fmha|attention|sdpa|flex_"),
    ("optimizer", r"adam|multi_tensor|foreach"),
    ("loss", r"cross_entropy|log_softmax|logsoftmax|nll_loss|softmax|logsumexp"),
    (
        "matrix products",
        r"gemm|gemv|triton_tem|cutlass|nvjet|cublas|wgmma|xmma|splitk|aten::(mm|addmm|bmm|baddbmm)$|matmul|mkldnn|linear",
    ),
    ("norms", r"rms_?norm|layer_?norm|add_norm|norm_kernel"),
    ("RoPE", r"rope|rotary"),
    ("activation", r"swiglu|geglu|silu|gelu|glu|gated"),
    ("adapters", r"lora|low_rank|add_product"),
    ("copies", r"memcpy|memset|copy|catarray|aten::(cat|clone|contiguous)$|fill|transpose_kernel"),
    ("embedding and indexing", r"embedding|add_rows|index|gather|scatter|sort|radix|nonzero|scan"),
    ("reductions", r"reduce|aten::(sum|mean|linalg_vector_norm)$"),
    ("other Triton kernels", r"^_(\w+_)?kernel"),
    ("elementwise", r"elementwise|aten::(mul|add|sub|div|neg|pow|rsqrt|exp|sqrt|sigmoid)_?$|foreach"),
)
"""Kind -> what the names of its kernels contain; the first that matches has it, any other is ``OTHER``."""


def kind_of(kernel: str) -> str:
    """The kind of a kernel (on a CPU: of an operator), by its name."""
    lowered = kernel.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lowered)), OTHER)


class PartTimer:
    """Milliseconds of each part of a step, from marks that the step passes; on a GPU they are events in its stream.

    The head and the loss are what comes between the end of the backbone and the beginning of the backward pass.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    @contextmanager
    def watching(self, backbone: nn.Module, optimizer: Any) -> Iterator[None]:
        """Within the block every pass through ``backbone``, backward pass and ``optimizer.step`` is marked."""
        hooks = (
            backbone.register_forward_pre_hook(lambda *_: self.begin(FORWARD)),
            backbone.register_forward_hook(lambda *_: self.begin(LOSS)),
        )
        backward, step = torch.autograd.backward, optimizer.step
        torch.autograd.backward = self._marked(backward, BACKWARD)  # which Tensor.backward calls
        optimizer.step = self._marked(step, OPTIMIZER)
        try:
            yield
        finally:
            torch.autograd.backward = backward
            optimizer.step = step
            for hook in hooks:
                hook.remove()

    def begin(self, part: str) -> None:
        """What follows belongs to ``part``."""
        self._marks.append((part, self._now()))

    def milliseconds(self) -> dict[str, float]:
        """By part, over all that was marked since the last call; the last mark only ends what was before it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        totals = dict.fromkeys(PARTS, 0.0)
        for (part, start), (_, end) in pairwise(self._marks):
            totals[part] += between(start, end)
        self._marks.clear()
        return totals

    def _now(self) -> Any:
        return now(self._device)

    def _marked(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.begin(part)
            result = function(*arguments, **options)
            self.begin(OTHER)
            return result

        return call


def now(device: torch.device) -> Any:
    """A point in time: an event in the GPU's stream, or the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Milliseconds from one `now` to another; those of a GPU must have passed."""
    return 1000 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def kernel_table(step: Callable[[], Any], device: torch.device, longest: int = 12) -> dict[str, Any]:
    """Run ``step`` under torch's profiler: milliseconds and calls by kind, and of the longest kernels.

    On a CPU there are operators instead of kernels, each without the ones that it calls.
    """
    gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        step()
        if gpu:
            torch.cuda.synchronize(device)
    rows = []
    for event in profiler.key_averages():
        time_us = event.self_device_time_total if gpu else event.self_cpu_time_total
        if time_us > 0 and not getattr(event, "is_user_annotation", False):
            rows.append(
                {"name": event.key[:160], "kind": kind_of(event.key), "ms": time_us / 1e3, "calls": event.count}
            )
    kinds: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = kinds.setdefault(row["kind"], {"ms": 0.0, "calls": 0})
        entry["ms"] += row["ms"]
        entry["calls"] += row["calls"]
    return {
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1]["ms"])),
        "longest": sorted(rows, key=lambda row: -row["ms"])[:longest],
    }
