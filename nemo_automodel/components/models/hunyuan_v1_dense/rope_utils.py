"""Hunyuan's RoPE: a larger base in place of frequencies that change with the length."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from nemo_automodel.components.models.common.combined_projection.combined_qkv import head_dim_of
from nemo_automodel.components.models.common.rope import rope_field


def ntk_alpha_inverse_frequencies(config: PreTrainedConfig, **kwargs: Any) -> tuple[Tensor, float]:
    """``base^(-2i/d)``, ``base = theta * alpha^(d / (d - 2))`` (fp32 ``[d/2]``), and the factor 1.0 on cos and sin."""
    dim = head_dim_of(config)
    base = rope_field(config, "rope_theta") * rope_field(config, "alpha") ** (dim / (dim - 2))
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim), 1.0
