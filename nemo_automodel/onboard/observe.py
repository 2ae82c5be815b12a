"""What transformers' class of a family computes, found by running a tiny one in float64 and trying formulas.

Nothing is read off names alone: a norm is "before attention" because its output is what attention is given, a head's
scores have a softcap because only that reproduces its output. What no formula here reproduces is a fact as well.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from nemo_automodel.components.models.common.combined_projection.combined_qkv import head_dim_of
from nemo_automodel.components.models.common.spec import NormSlots
from nemo_automodel.verify.diagnosis import Scores, attention_of, norm_of, same
from nemo_automodel.verify.exact import Exact
from nemo_automodel.verify.shrink import LENGTH
from nemo_automodel.verify.subject import randomize
from nemo_automodel.verify.trace import Point, Trace, trace

SLOTS = (
    "norm_eps",
    "layer_types",
    "qkv_bias",
    "o_bias",
    "sliding_window",
    "qk_norm",
    "attention_scale",
    "norms",
    "mlp",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_multiplier",
)
"""Slots that are filled from what is seen. What the others of `DecoderSpec` are for is listed, to be filled by hand."""

Facts = dict[str, Any]
"""By name: the slots in `SLOTS`, as values; and the names in `FIXED`."""

FIXED: dict[str, Any] = {
    "tensors": "as Llama's",
    "norm": "RMS, times the weight",
    "MLP": "down(act(gate) * up) or down(act(up)), act being config.hidden_act",
    "MLP bias": "config.mlp_bias",
    "attention": "causal softmax of scaled scores, heads grouped with neighbours",
    "softcap of the scores": None,
    "RoPE": "half-split, on every layer",
    "RoPE channels": "all",
    "RoPE tables": "one for all layers",
    "residual stream": "attention is added, then the MLP",
    "between embedding and first layer": "a factor at most",
    "between last layer and head": "one norm",
    "after the head": "a factor at most",
}
"""What no slot is filled from, and its value in the plainest decoder. Anything else has to be written by hand."""

EPSILON = 1e-3
"""Relative error of an observed epsilon, which stands beside a mean square."""

ATTENTION = ("RoPE", "softcap of the scores", "qk_norm", "attention_scale", "layer_types")
UNSEEN = "not seen, since the attention is not understood"
UNREAD = "not read: transformers' modules have other names"
_STANDARD = re.compile(
    r"model\.(embed_tokens|norm)\.weight|lm_head\.weight"
    r"|model\.layers\.\d+\.(self_attn\.([qkvo]_proj\.(weight|bias)|[qk]_norm\.weight)"
    r"|mlp\.(gate|up|down)_proj\.(weight|bias))"
)


def observe(reference_class: Any, config: PreTrainedConfig, *, attention: bool = True) -> Facts:
    """Build ``reference_class`` from ``config`` (a tiny one) with random weights, run it, and say what it did.

    Args:
        reference_class: transformers' causal-LM class.
        config: of a tiny model.
        attention: False leaves the formula of the attention unread, which takes seconds where none is found.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomize(reference_class._from_config(config, attn_implementation="eager").float()).double().eval()
    ids = torch.arange(5, 5 + LENGTH)[None] % config.vocab_size
    with Exact(), torch.no_grad():
        points = trace(model, input_ids=ids, use_cache=False)
        return _Reading(model, points, model.get_input_embeddings().weight[ids]).facts(attention)


class _Reading:
    """A model, what went through it, and the questions to both."""

    def __init__(self, model: Any, points: Trace, embedded: Tensor):
        self.model, self.config = model, model.config
        self.points, self.embedded = points, embedded  # the plain rows: a class may scale inside its embedding
        self.modules: Mapping[str, nn.Module] = dict(model.named_modules())
        self.weights = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.layers = [f"model.layers.{i}" for i in range(self.config.num_hidden_layers)]
        if self.layers[0] not in self.modules:
            raise ValueError(f"it has no {self.layers[0]}")

    def at(self, module: str, side: str) -> Tensor | None:
        return self.points.get(Point(module, side))

    def facts(self, attention: bool) -> Facts:
        norms = self.norms(self.layers[0])
        return {
            **self.structure(norms),
            **self.stream(norms),
            **self.attention(attention),
            **self.norm_formula(),
            "norms": norms,
            "MLP": self.mlp(),
        }

    def structure(self, norms: NormSlots) -> Facts:
        """Biases, gating, and what the state dict holds beyond that."""
        layer = self.layers[0]

        def has(name: str) -> bool:
            return f"{layer}.{name}" in self.weights

        biases = {has(f"self_attn.{name}_proj.bias") for name in "qkv"}
        mlp_biases = {has(f"mlp.{name}_proj.bias") for name in ("up", "down")}
        mlp_bias = bool(getattr(self.config, "mlp_bias", False))
        in_slots = {f"{layer}.{name}.weight" for name in norms.names() for layer in self.layers}
        unknown = [k for k in self.weights if not _STANDARD.fullmatch(k) and k not in in_slots]
        tensors = ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", key) for key in unknown))
        return {
            "qkv_bias": biases == {True} if len(biases) == 1 else "on some of the three",
            "o_bias": has("self_attn.o_proj.bias"),
            "mlp": "PlainMLP" if has("mlp.up_proj.weight") and not has("mlp.gate_proj.weight") else "CombinedGateUpMLP",
            "MLP bias": FIXED["MLP bias"] if mlp_biases == {mlp_bias} else " and ".join(map(str, sorted(mlp_biases))),
            "tensors": tensors or FIXED["tensors"],
        }

    def norms(self, layer: str) -> NormSlots:
        """Which norm gives attention and MLP their input, and which takes their output."""
        children = [name for name, module in self.modules[layer].named_children() if _is_norm(name, module)]

        def giving(module: str) -> str | None:
            return self._matching(layer, children, "output", self.at(f"{layer}.{module}", "input"))

        def taking(module: str) -> str | None:
            return self._matching(layer, children, "input", self.at(f"{layer}.{module}", "output"))

        return NormSlots(
            before_attention=giving("self_attn"),
            after_attention=taking("self_attn"),
            before_mlp=giving("mlp"),
            after_mlp=taking("mlp"),
        )

    def _matching(self, layer: str, names: Iterable[str], side: str, goal: Tensor | None) -> str | None:
        found = ((name, self.at(f"{layer}.{name}", side)) for name in names)
        return next((name for name, value in found if _same(value, goal)), None)

    def stream(self, norms: NormSlots) -> Facts:
        """How embeddings, branches and logits are put together."""
        residual, multiplier = self.residual(norms)
        first, final = self.layers[0], self.at("model.norm", "output")
        embedding = _factor(self.at(first, "input"), self.embedded)
        logits = _factor(self.at("", "output"), self.at("lm_head", "output"))
        tail = _same(self.at("model.norm", "input"), self.at(self.layers[-1], "output"))
        names = ("between embedding and first layer", "between last layer and head", "after the head")
        return {
            "residual stream": residual,
            "residual_multiplier": multiplier,
            "embedding_multiplier": 1.0 if embedding is None else embedding,
            "logits_multiplier": 1.0 if logits is None else logits,
            names[0]: "something else" if embedding is None else FIXED[names[0]],
            names[1]: FIXED[names[1]] if tail and _same(final, self.at("lm_head", "input")) else "something else",
            names[2]: FIXED[names[2]] if logits is not None else self._softcap(),
        }

    def _softcap(self) -> str:
        logits, head = self.at("", "output"), self.at("lm_head", "output")
        for name, value in _numbers(self.config):
            if head is not None and _same(logits, value * torch.tanh(head / value)):
                return f"a softcap, config.{name}"
        return "something else"

    def residual(self, norms: NormSlots) -> tuple[str, float | None]:
        """``FIXED``'s word or another one, and the factor on both branches."""
        for layer in self.layers:
            into, out = self.at(layer, "input"), self.at(layer, "output")
            attended = self.at(f"{layer}.{norms.after_attention or 'self_attn'}", "output")
            fed = self.at(f"{layer}.{norms.after_mlp or 'mlp'}", "output")
            between = self.at(f"{layer}.{norms.before_mlp or 'mlp'}", "input")
            if into is None or out is None or attended is None or fed is None or between is None:
                return UNREAD, 1.0
            if norms.before_attention is None and not _same(self.at(f"{layer}.self_attn", "input"), into):
                return "attention does not read a norm of it, nor itself", 1.0
            factor = _factor(between - into, attended)
            if factor is None or not _same(out, between + factor * fed):
                parallel = _same(out, into + attended + fed)
                return ("attention and MLP side by side" if parallel else "something else"), 1.0
        return FIXED["residual stream"], factor

    def attention(self, wanted: bool) -> Facts:
        """Windows, scale, RoPE, softcap and query/key norms of every layer."""
        channels, tables = self._rope_shape()
        facts: Facts = {"RoPE channels": channels, "RoPE tables": tables}
        unseen = facts | dict.fromkeys(ATTENTION, UNSEEN)
        if any(self.at(f"{self.layers[0]}.self_attn.{name}_proj", "output") is None for name in "qkv"):
            return unseen | {"attention": UNREAD}
        if not all(self._untouched(f"{self.layers[0]}.self_attn.{name}_proj") for name in "qkv"):
            return unseen | {"attention": "queries, keys or values are changed in place (clipped?)"}
        known: list[Scores] = []
        for layer in self.layers:
            found = attention_of(self.model, self.points, f"{layer}.self_attn") if wanted else None
            if found is None:
                return unseen | {"attention": "something that no formula tried here reproduces"}
            known.append(found)
        one = known[0]
        standard = {(each.groups, each.values, each.scale, each.softcap, each.norm) for each in known}
        window = f"window of {getattr(self.config, 'sliding_window', None)}"
        windows = {"causal": "full_attention", window: "sliding_attention"}
        ropes = list(dict.fromkeys(each.rope for each in known))
        return facts | {
            "attention": FIXED["attention"]
            if standard == {("neighbours", "its own", one.scale, one.softcap, one.norm)}
            else f"{one.groups} grouped, values {one.values}, or not the same in every layer",
            "RoPE": FIXED["RoPE"] if ropes == ["half-split"] else ", ".join(ropes),
            "softcap of the scores": self._named(one.softcap),
            "attention_scale": None if one.scale == head_dim_of(self.config) ** -0.5 else one.scale,
            "layer_types": tuple(windows.get(each.mask, each.mask) for each in known),
            "qk_norm": self._qk_norm(one.norm),
        }

    def _untouched(self, linear: str) -> bool:
        """Whether the output of a projection still was what it had computed when the pass was over."""
        module, into = self.modules[linear], self.at(linear, "input")
        return into is not None and _same(self.at(linear, "output"), module(into))

    def _named(self, value: float | None) -> str | None:
        """The config's field of that value."""
        if value is None:
            return None
        return next((f"config.{name}" for name, number in _numbers(self.config) if number == value), str(value))

    def _qk_norm(self, place: str) -> str | None:
        shape = self.weights.get(f"{self.layers[0]}.self_attn.q_norm.weight")
        if place == "none":
            return None
        if place != "before RoPE" or shape is None or len(shape) != 1:
            return place
        return "head" if shape[0] == head_dim_of(self.config) else "full"

    def _rope_shape(self) -> tuple[str, str]:
        width = head_dim_of(self.config)
        tables = (x for point, x in self.points.items() if "rotary_emb" in point.module and point.side == "cos")
        turning = next((cos.shape[-1] for cos in tables), 0)
        nested = any(isinstance(v, dict) for v in (getattr(self.config, "rope_parameters", None) or {}).values())
        channels = FIXED["RoPE channels"] if turning == width else f"{turning} of {width}"
        return channels, "one for each layer type" if nested else FIXED["RoPE tables"]

    def norm_formula(self) -> Facts:
        """What the norms multiply by and whether they centre; of all norms in the model."""
        kinds: dict[str, None] = {}
        epsilons: list[float] = []
        for name, module in self.modules.items():
            if not _is_norm(name, module):
                continue
            out, into = self.at(name, "output"), self.at(name, "input")
            if out is None or into is None:
                continue
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if weight is None:
                kinds["without a weight"] = None
            elif weight.shape != into.shape[-1:] or (found := norm_of(out, into, weight, bias)) is None:
                kinds["something that no formula tried here reproduces"] = None
            else:
                if not any(math.isclose(found["eps"], each, rel_tol=EPSILON) for each in epsilons):
                    epsilons.append(found["eps"])
                centred = "LayerNorm" if found["mean"] == "subtracted" else "RMS"
                kinds[f"{centred}, times {found['gain']}" + ", with a bias" * (found["bias"] != "no bias")] = None
        eps = epsilons[0] if len(epsilons) == 1 else " and ".join(map(str, epsilons)) or UNREAD
        return {"norm": " and ".join(kinds) or UNREAD, "norm_eps": eps}

    def mlp(self) -> str:
        """Whether it is gated or plain, on the activation that the common MLPs read."""
        path = f"{self.layers[0]}.mlp"
        goal, up, gate = (
            self.at(f"{path}.{name}_proj", side)
            for name, side in (("down", "input"), ("up", "output"), ("gate", "output"))
        )
        if goal is None or up is None:
            return UNREAD
        for name, value in vars(self.config).items():
            if isinstance(value, str) and value in ACT2FN:
                act = ACT2FN[value]
                if _same(goal, act(up) if gate is None else act(gate) * up):
                    return FIXED["MLP"] if name == "hidden_act" else f"the activation is in config.{name}"
        return "something that no activation named in the config gives"


def _is_norm(path: str, module: nn.Module) -> bool:
    named = "norm" in path.rpartition(".")[2].lower()
    return named and not isinstance(module, nn.Identity) and next(module.children(), None) is None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and same(a, b)


def _factor(a: Tensor | None, b: Tensor | None) -> float | None:
    """The number that ``b`` is multiplied by to give ``a``, None where there is none."""
    if a is None or b is None or a.shape != b.shape:
        return None
    factor = float(f"{((a * b).sum() / (b * b).sum()).item():.12g}")
    return factor if same(a, factor * b) else None


def _numbers(config: PreTrainedConfig) -> Iterable[tuple[str, float]]:
    return ((k, float(v)) for k, v in vars(config).items() if isinstance(v, int | float) and v and v is not True)
