"""The gated MLP (GLU variants, Shazeer 2020, arXiv:2002.05202, equation 6) with one fused gate-and-up projection."""

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


class CombinedGateUpMLP(nn.Module):
    """``down_proj(act(gate) * up)`` with ``gate`` and ``up`` from one ``gate_up_proj``.

    The rows of ``gate_up_proj`` alternate ``gate_0, up_0, gate_1, up_1, ...``, so that plain column-wise tensor
    parallelism gives every rank complete pairs.

    Args:
        config: reads ``hidden_size``, ``intermediate_size``, ``hidden_act`` (any of transformers' activations) and
            ``mlp_bias`` (False where the config has none).

    Raises:
        ValueError: an activation that transformers does not know.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        bias = getattr(config, "mlp_bias", False)
        if config.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={config.hidden_act!r} is not one of {', '.join(sorted(ACT2FN))}")
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., hidden_size] -> [..., hidden_size]``."""
        gate, up = self.gate_up_proj(hidden_states).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down_proj(self.act_fn(gate) * up)


class PlainMLP(nn.Module):
    """``down_proj(act(up_proj(x)))``, the ungated MLP; reads the same config fields as `CombinedGateUpMLP`."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        bias = getattr(config, "mlp_bias", False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., hidden_size] -> [..., hidden_size]``."""
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))
