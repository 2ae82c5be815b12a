"""The gated MLP (GLU variants, Shazeer 2020, arXiv:2002.05202, equation 6) with one fused gate-and-up projection."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN, XIELUActivation

from nemo_automodel.components.kernels.gated import ACTIVATIONS, gated
from nemo_automodel.components.kernels.launch import runs_on
from nemo_automodel.components.kernels.linear import Gated, Linear, takes_gated


class CombinedGateUpMLP(nn.Module):
    """``down_proj(act(gate) * up)`` with ``gate`` and ``up`` from one ``gate_up_proj``.

    The rows of ``gate_up_proj`` alternate ``gate_0, up_0, gate_1, up_1, ...``, so that plain column-wise tensor
    parallelism gives every rank complete pairs.

    Args:
        config: reads ``hidden_size`` and, of these, what is not given: ``intermediate_size``, ``hidden_act`` (any of
            transformers' activations) and ``mlp_bias`` (False where the config has none).
        activation: name of one of transformers' activations.
        bias: whether the projections have biases.
        intermediate_size: channels of gate and of up.

    Attributes:
        kernels: whether to use the library's own kernel where it can run.

    Raises:
        ValueError: an activation that transformers does not know.
    """

    kernels = True

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        activation: str | None = None,
        bias: bool | None = None,
        intermediate_size: int | None = None,
    ):
        super().__init__()
        bias = getattr(config, "mlp_bias", False) if bias is None else bias
        width = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_up_proj = Linear(config.hidden_size, 2 * width, bias=bias)
        self.down_proj = Linear(width, config.hidden_size, bias=bias)
        self.activation = config.hidden_act if activation is None else activation
        self.act_fn = _activation(self.activation)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., hidden_size] -> [..., hidden_size]``."""
        gate_up = self.gate_up_proj(hidden_states)
        if self.kernels and self.activation in ACTIVATIONS and runs_on(gate_up):
            lazily = takes_gated(self.down_proj)
            return self.down_proj(Gated(gate_up, self.activation) if lazily else gated(gate_up, self.activation))
        gate, up = gate_up.unflatten(-1, (-1, 2)).unbind(-1)
        return self.down_proj(self.act_fn(gate) * up)


class PlainMLP(nn.Module):
    """``down_proj(act(up_proj(x)))``, the ungated MLP; the arguments are `CombinedGateUpMLP`'s."""

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        activation: str | None = None,
        bias: bool | None = None,
        intermediate_size: int | None = None,
    ):
        super().__init__()
        bias = getattr(config, "mlp_bias", False) if bias is None else bias
        width = config.intermediate_size if intermediate_size is None else intermediate_size
        self.up_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.act_fn = _activation(config.hidden_act if activation is None else activation)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., hidden_size] -> [..., hidden_size]``."""
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


def _activation(name: str) -> nn.Module:
    if name not in ACT2FN:
        raise ValueError(f"hidden_act={name!r} is not one of {', '.join(sorted(ACT2FN))}")
    # xIELU has parameters, which transformers would make in bf16 in any model
    return XIELUActivation(dtype=torch.get_default_dtype()) if name == "xielu" else ACT2FN[name]
