"""Rotary position embeddings by Transformer Engine's kernel, which takes angles and turns in fp32."""

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_automodel.components.models.common.te.engine import package, refuse_off_gpu


class Angles(NamedTuple):
    """What stands for tables of cos and sin.

    Attributes:
        angles: fp32 ``[B or 1, S, rotary_dim]``.
        scale: factor on cos and sin.
    """

    angles: Tensor
    scale: float


class Tokens(NamedTuple):
    """What the kernel takes beside queries or keys.

    Attributes:
        freqs: fp32 ``[S, 1, 1, rotary_dim]``, or ``[B * S, 1, 1, rotary_dim]`` where rows have other positions.
        bounds: int32 ``[0, B * S]``: all rows as one sequence, since each token's angles are its own; None: the rows
            have the same positions.
    """

    freqs: Tensor
    bounds: Tensor | None

    @classmethod
    def of(cls, angles: Tensor) -> "Tokens":
        """Of the angles of `Angles`."""
        freqs = angles.flatten(0, 1)[:, None, None].contiguous()
        count = len(freqs)
        return cls(freqs, None if len(angles) == 1 else _bounds(count, angles.device))


def _bounds(count: int, device: torch.device) -> Tensor:
    return torch.arange(0, count + 1, count, dtype=torch.int32, device=device)  # made there: nobody waits


def turn(q: Tensor, k: Tensor, by: Angles) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[B, heads, S, D]``, their first ``rotary_dim`` channels turned; rounded once.

    Raises:
        ValueError: they are not on a GPU.
    """
    refuse_off_gpu(q)
    tokens = Tokens.of(by.angles)
    return _turned(q, tokens, by.scale), _turned(k, tokens, by.scale)


@torch.compiler.disable
def _turned(x: Tensor, tokens: Tokens, scale: float) -> Tensor:
    apply_rotary_pos_emb = package("pytorch.attention.rope").apply_rotary_pos_emb
    heads = x.transpose(1, 2)
    if scale != 1.0:
        turning = tokens.freqs.shape[-1]
        heads = torch.cat((heads[..., :turning] * scale, heads[..., turning:]), dim=-1)
    if tokens.bounds is None:
        turned = apply_rotary_pos_emb(heads, tokens.freqs, tensor_format="bshd", fused=True)
    else:
        flat = heads.flatten(0, 1)
        turned = apply_rotary_pos_emb(flat, tokens.freqs, tensor_format="thd", fused=True, cu_seqlens=tokens.bounds)
        turned = turned.unflatten(0, heads.shape[:2])
    output: Tensor = turned.transpose(1, 2)
    return output
