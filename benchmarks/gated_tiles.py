"""Milliseconds of the gated activation's kernels with adapters on their way, by launch configuration, on a GPU.

    python benchmarks/gated_tiles.py                  # Llama-3-8B's MLP, 8,192 tokens, adapters of rank 16
    python benchmarks/gated_tiles.py --width 18944    # Qwen2.5-7B's

A configuration is rows, pairs and warps of a program, and how far one goes (`gated.TILE`, `gated.STRETCH` and
`gated.FORWARD_TILE`, `gated.FORWARD_STRETCH`); results do not depend on it (tests/gpu/test_kernels.py). The floor is
what the kernel has to read and write, at the bandwidth of a copy measured beside it.
"""

import argparse
import itertools

import torch
from triton.testing import do_bench

from nemo_automodel.components.kernels import gated

BACKWARD = [
    *itertools.product([(16, 64, 2)], [256, 512, 1024, 2048]),
    *itertools.product([(16, 32, 1), (16, 32, 2), (16, 64, 1), (16, 64, 4), (16, 128, 4), (16, 128, 8)], [512, 1024]),
    *itertools.product([(32, 32, 2), (32, 64, 4), (32, 64, 8), (64, 32, 4)], [512, 1024]),
]
FORWARD = [
    *itertools.product([(32, 64, 4)], [1024, 2048, 4096]),
    *itertools.product([(16, 64, 2), (16, 128, 4), (32, 128, 8), (32, 32, 2), (64, 64, 4), (64, 64, 8)], [2048]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=14336)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    tokens, width, rank = options.tokens, options.width, options.rank
    to = {"device": "cuda", "dtype": torch.bfloat16}
    gate_up, grad = torch.randn(tokens, 2 * width, **to), torch.randn(tokens, width, **to)
    left, a, t = torch.randn(tokens, rank, **to), torch.randn(rank, width, **to), torch.randn(tokens, 2 * rank, **to)
    out = torch.empty_like(grad)
    copied = do_bench(lambda: torch.empty_like(gate_up).copy_(gate_up), return_mode="median")
    bandwidth = 2 * gate_up.nbytes / copied
    floors = {"backward": (2 * gate_up.nbytes + grad.nbytes) / bandwidth, "forward": 3 * grad.nbytes / bandwidth}
    print(f"a copy moves {bandwidth / 1e9:.2f} TB/s; " + ", ".join(f"{k} {v:.3f} ms" for k, v in floors.items()))

    for gated.TILE, gated.STRETCH in BACKWARD:
        ms = do_bench(
            lambda: gated.gated_low_rank_backward(grad, gate_up, 0, left, a, t, rank, rank), return_mode="median"
        )
        print(f"backward {gated.TILE} {gated.STRETCH}: {ms:.3f} ms", flush=True)
    for gated.FORWARD_TILE, gated.FORWARD_STRETCH in FORWARD:
        ms = do_bench(lambda: gated.gated_low_rank_forward(gate_up, out, 0, a), return_mode="median")
        print(f"forward {gated.FORWARD_TILE} {gated.FORWARD_STRETCH}: {ms:.3f} ms", flush=True)


if __name__ == "__main__":
    main()
