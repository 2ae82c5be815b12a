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

EMBEDDING = "embedding_rowwise"
"""Style of the token embeddings: each rank has a part of the vocabulary."""


class NotCut(ValueError):
    """A model has something that the plan would cut wrongly; the message names it."""


def tp_plan_of(model: nn.Module) -> dict[str, str]:
    """What the class declares as its ``_tp_plan``, `LAYER_TP_PLAN` for what of it the model has, and the embeddings.

    Not the plan that transformers puts together (``model.tp_plan``): where a backbone does not set its own, that one
    names the separate projections, which do not exist here.

    Raises:
        NotCut: the layers have parameters that would be whole beside activations that are not (xIELU's, norms with a
            weight for each head).
    """
    plan = layers_plan_of(model)
    for name, parameter in model.named_parameters():
        if re.search(r"layers\.\d+\.mlp\.act_fn\.", name):
            raise NotCut(
                f"{name}, of the activation, would learn from one rank's channels only: there is no plan for it"
            )
        if re.search(r"layers\.\d+\.self_attn\.[qk]_norm\.", name) and parameter.ndim > 1:
            raise NotCut(
                f"{name} has a row for each head, of which each rank has some: there is no plan for such norms"
            )
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return plan | {name: EMBEDDING for name, module in model.named_modules() if module is embeddings}


def layers_plan_of(model: nn.Module) -> dict[str, str]:
    """The same, whether it is right or not."""
    modules = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in model.named_modules()}
    layers = {
        name: style
        for name in sorted(modules)
        for suffix, style in LAYER_TP_PLAN.items()
        if f".{name}".endswith(f".{suffix}")
    }
    return layers | (getattr(type(model), "_tp_plan", None) or {})
