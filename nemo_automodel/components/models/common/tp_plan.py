"""How a model is cut over tensor-parallel ranks: module name -> style."""

import re

from torch import nn

LAYER_TP_PLAN = {
    "layers.*.self_attn.qkv_proj": "colwise",
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_up_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
"""What every layer cuts, by the names that the pattern gives it."""


def tp_plan_of(model: nn.Module) -> dict[str, str]:
    """What the class declares as its ``_tp_plan``, and `LAYER_TP_PLAN` for what of it the model has.

    Not the plan that transformers puts together (``model.tp_plan``): where a backbone does not set its own, that one
    names the separate projections, which do not exist here.
    """
    modules = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in model.named_modules()}
    layers = {
        name: style
        for name in sorted(modules)
        for suffix, style in LAYER_TP_PLAN.items()
        if f".{name}".endswith(f".{suffix}")
    }
    return layers | (getattr(type(model), "_tp_plan", None) or {})
