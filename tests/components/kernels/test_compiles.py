"""Every kernel becomes a program of an H100, without one: the interpreter takes what Triton's compiler refuses.

Where compiled for rows that 16 bytes can be read of at once, as they are in training, no register goes to memory.
"""

import re
import subprocess
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from nemo_automodel.components.kernels import (
    adamw,
    add_norm,
    float8,
    gated,
    launch,
    linear_cross_entropy,
    low_rank,
    qkv_rope,
    squares,
    tied,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None or launch.INTERPRETED, reason="needs Triton, not interpreting"),
]

ROPE = {"GROUP": 4, "D": 128, "HALF": 64, "TOKENS": 4, "BLOCK": 64, "REST": 1}
LOSS = {"V": 128256, "CAP": False, "BLOCK": 8192}
MLP = {"KIND": 0, "RANK": 16, "WIDE": False}
FORWARD = MLP | {"STRETCH": gated.FORWARD_STRETCH, **dict(zip(("ROWS", "BLOCK"), gated.FORWARD_TILE, strict=False))}
BACKWARD = MLP | {"STRETCH": gated.STRETCH, **dict(zip(("ROWS", "BLOCK"), gated.TILE, strict=False))}
NORM = {"BLOCK": 4096}
ADAMW = {"ALIGNED": True, "COLUMNS": 11, "SCALARS_COLUMNS": 3, "LANE": 512, "HALF": True, "HALF_GRADIENT": True}
PROGRAMS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "norm": (add_norm.add_norm_forward_kernel, 8, NORM | {"ADD": True, "KEEP": True}),
    "norm, backward": (add_norm.add_norm_backward_kernel, 8, NORM | {"WITH_TOTAL": True, "WITH_WEIGHT": True}),
    "gated": (gated.gated_forward_kernel, 4, {"KIND": 0, "BLOCK": 1024}),
    "gated, gelu, backward": (gated.gated_backward_kernel, 4, {"KIND": 1, "WITH_OUT": True, "BLOCK": 1024}),
    "gated, adapters": (gated.gated_low_rank_forward_kernel, gated.FORWARD_TILE[2], FORWARD),
    "gated, adapters, backward": (gated.gated_low_rank_backward_kernel, gated.TILE[2], BACKWARD | {"PAIRED": 0}),
    "gated, adapters behind, backward": (
        gated.gated_low_rank_backward_kernel,
        gated.TILE[2],
        BACKWARD | {"PAIRED": 16},
    ),
    "adding a product": (
        low_rank.add_product_kernel,
        4,
        {"RANK": 64, "ROWS": 64, "BLOCK": 128, "WIDE": False, "WITH_BIAS": True},
    ),
    "adapters together": (low_rank.low_rank_pack_kernel, 4, {"BLOCK": 2048}),
    "adapters apart": (low_rank.low_rank_unpack_kernel, 4, {"WITH_COLUMNS": True, "BLOCK": 2048}),
    "loss": (linear_cross_entropy.cross_entropy_kernel, 32, LOSS | {"IGNORE": -100}),
    "loss, statistics": (linear_cross_entropy.cross_entropy_statistics_kernel, 16, LOSS | {"CAP": True}),
    "loss, gradient": (linear_cross_entropy.cross_entropy_gradient_kernel, 16, LOSS | {"IGNORE": -100}),
    "scaled": (linear_cross_entropy.scaled_kernel, 16, {"BLOCK": 8192}),
    "tied": (tied.add_rows_kernel, 4, {"AT_ONCE": 8, "BLOCK": 512}),
    "rope": (qkv_rope.qkv_rope_kernel, 1, ROPE | {"BACKWARD": False, "NORM": False, "WITH_WEIGHT": False}),
    "rope, normed, backward": (
        qkv_rope.qkv_rope_kernel,
        1,
        ROPE | dict.fromkeys(("BACKWARD", "NORM", "WITH_WEIGHT"), True),
    ),
    "float8": (float8.float8_quantize_kernel, 4, {"HIGHEST": 448.0, "WITH_COLUMNS": True, "BLOCK": 4096}),
    "float8, transposed": (float8.float8_transpose_kernel, 8, {"TILE": 128}),
    "adamw, exact": (adamw.adamw_kernel, 4, ADAMW | {"LOW": True, "HALF_MOMENTS": False}),
    "adamw, stochastic": (adamw.adamw_kernel, 4, ADAMW | {"LOW": False, "HALF_MOMENTS": True}),
    "squares": (squares.squares_kernel, 8, {"HALF": True, "ALIGNED": True, "BLOCK": 8192}),
}
"""Kernel, warps and compile-time constants, as the shapes of an 8B model give them."""

POINTERS = {
    **dict.fromkeys(("TARGETS", "IDS", "ORDER", "TABLE", "ADDRESSES"), "*i64"),
    **dict.fromkeys(
        (
            *("RSTD", "GRAD_WEIGHT", "SUMS", "PAIR_SUMS", "MAXIMUM", "SUM", "AT_TARGET", "LOSS", "LSE", "FACTOR"),
            *("COLUMNS", "SCALE", "SCALARS", "SCALES"),
        ),
        "*fp32",
    ),
    "OWNERS": "*i32",
}
"""What the others are not: of the model's dtype."""
FP32 = ("eps", "offset", "multiplier", "softcap", "beta2", "rest1", "rest2")


def _argument(name: str, kernel: str, dtype: str) -> str:
    if name.isupper():
        special = {"float8_quantize_kernel": {"OUT": "*fp8e4nv"}, "float8_transpose_kernel": {"X": "*u8", "OUT": "*u8"}}
        return special.get(kernel, {}).get(name) or POINTERS.get(name, f"*{dtype}")
    return "fp32" if name in FP32 else "i32"


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "anywhere"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_compiles(name: str, aligned: bool, tmp_path: Path) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, warps, constants = PROGRAMS[name]
    names, of = kernel.arg_names, partial(_argument, kernel=kernel.__name__, dtype="bf16" if aligned else "fp32")
    signature = {each: "constexpr" if each in constants else of(each) for each in names}
    sixteen = [["tt.divisibility", 16]]
    divisible = (i for i, each in enumerate(names) if aligned and signature[each].startswith(("*", "i32")))
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(each),): value for each, value in constants.items()},
        attrs={(i,): sixteen for i in divisible},
    )
    program = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert program.metadata.shared <= 227 * 1024
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if aligned and tool.exists():
        (tmp_path / "cubin").write_bytes(program.asm["cubin"])
        command = [str(tool), "--dump-resource-usage", str(tmp_path / "cubin")]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        stack = max(map(int, re.findall(r"STACK:(\d+)", usage)))
        assert stack <= 16, usage  # a number or two
