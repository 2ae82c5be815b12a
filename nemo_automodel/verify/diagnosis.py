"""What a difference looks like: the one change of formula that turns the reference's result into the other.

Everything here works on float64 traces, where a right guess reproduces a tensor to ten digits, so guesses are tried
one by one and none is reported that does not explain all of it.

Shapes: B batch, S sequence, H query heads, K key/value heads, D head_dim.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_automodel.verify.names import stored_name
from nemo_automodel.verify.outcome import formula
from nemo_automodel.verify.trace import Point, Trace

UNKNOWN = "no single change of formula that is known here explains it"


@dataclass(frozen=True)
class Scene:
    """Both traces, both models and the place where they part."""

    point: Point
    expected: Trace
    actual: Trace
    reference: Any
    ours: Any
    inputs: Mapping[str, Any]

    @property
    def siblings(self) -> str:
        """Path of the module that holds the one at the point, with a dot."""
        return self.point.module.rpartition(".")[0] + "."

    def module(self) -> nn.Module | None:
        """The reference's module at the point."""
        modules = self.reference.named_modules()
        return next(
            (module for name, module in modules if stored_name(self.reference, name) == self.point.module), None
        )


def explain(point: Point, expected: Trace, actual: Trace, reference: Any, ours: Any, inputs: Mapping[str, Any]) -> str:
    """What the difference at ``point``, the first one, looks like."""
    scene = Scene(point, expected, actual, reference, ours, inputs)
    if expected[point].shape != actual[point].shape:
        return f"shape {list(actual[point].shape)} instead of {list(expected[point].shape)}"
    if point.side in ("cos", "sin"):
        return _rope_tables(scene)
    leaf = point.module.rpartition(".")[2]
    if point.side == "input":
        if leaf == "o_proj":
            return _attention(scene)
        if leaf == "down_proj":
            return _activation(scene)
        return _residual(scene)
    module = scene.module()
    if isinstance(module, nn.Linear):
        return _linear(scene, module)
    if isinstance(module, nn.Embedding):
        return _scaled(scene, "the embeddings are")
    if module is not None and "norm" in type(module).__name__.lower() and hasattr(module, "weight"):
        return _norm(scene, module)
    if not point.module:
        return _logits(scene)
    return _residual(scene)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two float64 tensors come of the same formula."""
    return formula("", a, b).passed


def _ratio(scene: Scene) -> float | None:
    """The one factor between the two tensors, None where there is none."""
    a, b = scene.actual[scene.point], scene.expected[scene.point]
    factor = ((a * b).sum() / (b * b).sum()).item()
    return factor if same(a, factor * b) else None


def _scaled(scene: Scene, what: str) -> str:
    factor = _ratio(scene)
    return UNKNOWN if factor is None else f"{what} {factor:.6g} times the reference's: a scaling factor is wrong"


def _logits(scene: Scene) -> str:
    if (factor := _ratio(scene)) is not None:
        return f"the logits are {factor:.6g} times the reference's: the scaling of the logits is wrong"
    if same(scene.actual[scene.point].tanh(), scene.expected[scene.point].tanh()):
        return "the softcap of the logits is missing"
    head = scene.expected.get(Point(stored_name(scene.reference, "lm_head"), "output"))
    if head is not None and same(scene.actual[scene.point], head):
        return "what the reference does to the logits (scaling, softcap) is missing"
    return UNKNOWN


# -- linear layers ----------------------------------------------------------------------------------------------------


def _linear(scene: Scene, module: nn.Linear) -> str:
    own, name = scene.actual[scene.point].flatten(0, -2), scene.point.module.rpartition(".")[2]
    if not same(scene.actual.get(Point(scene.point.module, "input"), own), _input(scene, own)):
        return "its input differs already"
    reference = scene.expected[scene.point].flatten(0, -2)
    gap = own - reference
    if same(gap, gap[:1].expand_as(gap)):
        if module.bias is not None and same(gap[0], -module.bias.detach()):
            return "its bias is missing"
        return "its bias is another one" if module.bias is not None else "it has a bias that the reference has not"
    for other, value in _neighbours(scene).items():
        if value.shape == reference.shape and same(own, value):
            return f"{name} computes what {other} should: the two are swapped"
    if module is scene.reference.get_output_embeddings():
        embedding = scene.reference.get_input_embeddings().weight.detach()
        hidden = scene.expected[Point(scene.point.module, "input")].flatten(0, -2)
        tied = getattr(scene.reference.config, "tie_word_embeddings", False)
        if not tied and same(own, hidden @ embedding.T):
            return "the head is tied to the embedding, which the reference's is not"
        if tied:
            return "the head is not the embedding, to which the reference ties it"
    if (factor := _ratio(scene)) is not None:
        return f"it is {factor:.6g} times the reference's: a scaling factor is wrong"
    return _rows(scene, name, own, reference)


def _input(scene: Scene, default: Tensor) -> Tensor:
    return scene.expected.get(Point(scene.point.module, "input"), default)


def _neighbours(scene: Scene) -> dict[str, Tensor]:
    """Outputs of the reference's layers beside this one."""
    return {
        point.module.rpartition(".")[2]: value.flatten(0, -2)
        for point, value in scene.expected.items()
        if point.side == "output"
        and point.module.rpartition(".")[0] + "." == scene.siblings
        and point.module != scene.point.module
        and point.module.endswith("proj")
    }


def _rows(scene: Scene, name: str, own: Tensor, reference: Tensor) -> str:
    """Whether the layer has the reference's rows in another order, or rows of its neighbours."""
    pool = {name: reference, **{k: v for k, v in _neighbours(scene).items() if v.shape[0] == reference.shape[0]}}
    columns = torch.cat(list(pool.values()), dim=-1)
    distance, match = torch.cdist(own.T, columns.T).min(dim=-1)
    if distance.max() > 1e-6 * own.abs().max():
        return "its weight is another one (not loaded from these rows, or transformed)"
    names = [key for key, value in pool.items() for _ in range(value.shape[-1])]
    strangers = sorted({names[i] for i in match.tolist()} - {name})
    if strangers:
        return f"rows of {name} are taken from {' and '.join(strangers)}: the fused rows are split wrongly"
    head_dim = _head_dim(scene.reference.config)
    if name in ("q_proj", "k_proj", "v_proj") and own.shape[-1] % head_dim == 0:
        heads = match.view(-1, head_dim)
        if (heads - heads[:, :1] == torch.arange(head_dim, device=heads.device)).all():
            return f"the heads of {name} are in the order {(heads[:, 0] // head_dim).tolist()}: head order mixed"
        if (heads // head_dim == heads[:, :1] // head_dim).all():
            return f"the rows of {name} are in another order inside each head: the other RoPE convention's, or wrong"
    return f"the rows of {name} are in another order"


# -- norms ------------------------------------------------------------------------------------------------------------


def _norm(scene: Scene, module: nn.Module) -> str:
    x = scene.expected[Point(scene.point.module, "input")]
    weight, bias = module.weight.detach(), getattr(module, "bias", None)  # type: ignore[operator]
    found = [norm_of(trace[scene.point], x, weight, bias) for trace in (scene.expected, scene.actual)]
    return _contrast(*found)


def norm_of(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Any] | None:
    """Which norm of ``x`` gives ``y``: what it multiplies by, whether it centres, which epsilon."""
    gains = {"the weight": weight, "1 + the weight": 1 + weight, "no weight": torch.ones_like(weight)}
    biases: dict[str, Tensor | float] = {"no bias": 0.0}
    if bias is not None:
        biases["a bias"] = bias.detach()
    for (gain, factor), (shift, offset), centred in itertools.product(gains.items(), biases.items(), (False, True)):
        source = x - x.mean(-1, keepdim=True) if centred else x
        normed = (y - offset) / factor
        # the row's own scale: normed = source / sqrt(mean square + eps)
        scale = (normed * source).sum(-1, keepdim=True) / source.square().sum(-1, keepdim=True)
        if not same(normed, source * scale):
            continue
        eps = scale.pow(-2) - source.square().mean(-1, keepdim=True)
        value = eps.median().item()
        if (eps - value).abs().max() < 1e-9 + 1e-6 * abs(value):
            return {
                "gain": gain,
                "bias": shift,
                "mean": "subtracted" if centred else "kept",
                "eps": float(f"{value:.4g}"),
            }
    return None


# -- RoPE tables ------------------------------------------------------------------------------------------------------


def _rope_tables(scene: Scene) -> str:
    module = scene.point.module
    expected, actual = (
        (t[Point(module, "cos")].flatten(0, -2), t[Point(module, "sin")].flatten(0, -2))
        for t in (scene.expected, scene.actual)
    )
    radius = [(cos.square() + sin.square()).sqrt() for cos, sin in (expected, actual)]
    if not same(*radius):
        lengths = [float(each.max()) for each in radius]
        return f"cos and sin have length {lengths[1]:.6g} instead of {lengths[0]:.6g}: the attention factor is wrong"
    if expected[0].shape[0] < 2:
        return UNKNOWN
    turns = [torch.atan2(sin[1], cos[1]) - torch.atan2(sin[0], cos[0]) for cos, sin in (expected, actual)]
    half = turns[0].shape[-1] // 2
    if same(turns[0].sort().values, turns[1].sort().values):
        return "the frequencies are the reference's in another order: interleaved instead of halved, or the reverse"
    first, second = (f"{t[1 % half].item():.6g}, {t[half - 1].item():.6g}" for t in turns)
    return f"frequencies (second and last) are {second} instead of {first}: rope_theta or the RoPE scaling is wrong"


# -- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """One way to compute attention from projected queries, keys and values; see `_attend`."""

    scale: float
    values: str
    rope: str
    mask: str
    groups: str
    norm: str
    softcap: float | None


ROPES = ("half-split", "interleaved", "turned the other way", "on no head", "on queries only", "on keys only")


def _attention(scene: Scene) -> str:
    if _projected(scene) is None:
        return "scores, mask or values are computed in another way"
    found = [_scores_of(scene, each) for each in (scene.expected, scene.actual)]
    return _contrast(*[None if f is None else {x.name: getattr(f, x.name) for x in fields(f)} for f in found])


def attention_of(model: Any, found: Trace, module: str) -> Scores | None:
    """How the attention at the path ``module`` computes; None where nothing tried here reproduces it."""
    scene = Scene(Point(f"{module}.o_proj", "input"), found, found, model, model, {})
    return None if scene.point not in found or _projected(scene) is None else _scores_of(scene, found)


def _projected(scene: Scene) -> tuple[Tensor, Tensor, Tensor] | None:
    """The reference's queries ``[B, H, S, D]``, keys and values ``[B, K, S, D]`` before norms and RoPE."""
    parts = [scene.expected.get(Point(f"{scene.siblings}{name}", "output")) for name in ("q_proj", "k_proj", "v_proj")]
    found = [part for part in parts if part is not None]
    if len(found) < 3 or _tables(scene) is None:
        return None
    query, key, value = (x.unflatten(-1, (-1, _head_dim(scene.reference.config))).transpose(1, 2) for x in found)
    return query, key, value


def _scores_of(scene: Scene, found: Trace) -> Scores | None:
    """The way of computing attention that gives what ``found`` has at the point."""
    projected, tables = _projected(scene), _tables(scene)
    assert projected is not None
    assert tables is not None
    query, key, value = projected
    config, length = scene.reference.config, query.shape[2]
    goal = found[scene.point].unflatten(-1, (-1, query.shape[-1])).transpose(1, 2)
    window = getattr(config, "sliding_window", None)
    modules = dict(scene.reference.named_modules())
    norms = [modules.get(f"{scene.siblings}{name}") for name in _NORM_NAMES if f"{scene.siblings}{name}" in modules]
    norm_choices = ("before RoPE", "after RoPE", "none") if len(norms) == 2 else ("none",)
    masks = ["causal", "none", "causal without the token itself", "causal and one token more"]
    for size in dict.fromkeys((window, (window or 0) + 1, (window or 0) - 1)):
        if window and size and size < length:
            masks.append(f"window of {size}")
    caps = dict.fromkeys((None, getattr(config, "attn_logit_softcapping", None)))
    for values, norm, rope, groups in itertools.product(
        ("its own", "the keys'"), norm_choices, ROPES, ("neighbours", "strides")
    ):
        q, k, v = (query, key, value) if values == "its own" else (query, value, key)
        if norm == "before RoPE":
            q, k = _normed(norms[0], q), _normed(norms[1], k)
        q, k = _rotate(q, k, *tables, rope)
        if norm == "after RoPE":
            q, k = _normed(norms[0], q), _normed(norms[1], k)
        count = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(count, 1) if groups == "neighbours" else x.repeat(1, count, 1, 1) for x in (k, v))
        raw = q @ k.transpose(2, 3)
        for mask, scale, cap in itertools.product(masks, _scales(scene), caps):
            if same(_attend(raw * scale, v, mask, cap), goal):
                return Scores(scale, values, rope, mask, groups, norm, cap)
    return None


def _attend(scores: Tensor, value: Tensor, mask: str, cap: float | None) -> Tensor:
    """Softmax over what ``mask`` lets each query see, times ``value``."""
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    at = torch.arange(scores.shape[-1], device=scores.device)
    distance = at[:, None] - at  # of the key, backwards
    seen = {
        "none": torch.ones_like(distance, dtype=torch.bool),
        "causal": distance >= 0,
        "causal without the token itself": (distance > 0) | (at[:, None] == 0) & (at == 0),
        "causal and one token more": distance >= -1,
    }.get(mask)
    if seen is None:
        seen = (distance >= 0) & (distance < int(mask.rpartition(" ")[2]))
    return F.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ value


_NORM_NAMES = ("q_norm", "k_norm", "query_layernorm", "key_layernorm")


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    """Per head or, where the weight is as wide as all heads together, over all of them; ``x`` ``[B, H, S, D]``."""
    assert norm is not None
    weight = getattr(norm, "weight", None)
    if weight is None or weight.shape[-1] == x.shape[-1]:
        return norm(x.transpose(1, 2)).transpose(1, 2)
    return norm(x.transpose(1, 2).flatten(2)).unflatten(-1, (-1, x.shape[-1])).transpose(1, 2)


def _scales(scene: Scene) -> Iterable[float]:
    config = scene.reference.config
    head_dim = _head_dim(config)
    values = [head_dim**-0.5, 1.0, head_dim**-1.0, config.hidden_size**-0.5]
    values += [x for name in ("attention_multiplier",) if (x := getattr(config, name, None))]
    values += [x**-0.5 for name in ("query_pre_attn_scalar",) if (x := getattr(config, name, None))]
    for model in (scene.reference, scene.ours):
        module = dict(model.named_modules()).get(scene.siblings[:-1])
        if isinstance(scaling := getattr(module, "scaling", None), float):
            values.append(scaling)
    return dict.fromkeys(values)


def _tables(scene: Scene) -> tuple[Tensor, Tensor] | None:
    """cos and sin ``[B, 1, S, D]`` of the reference, the last ones made before this point for its type of layer."""
    types, layer = getattr(scene.reference.config, "layer_types", None), re.search(r"layers\.(\d+)\.", scene.siblings)
    others = set(types) - {types[int(layer[1])]} if types and layer else set()
    found: dict[str, Tensor] = {}
    for point, value in scene.expected.items():
        if point == scene.point:
            break
        if point.side in ("cos", "sin") and point.module.rpartition(".")[2] not in others:
            found[point.side] = value
    return (found["cos"].unsqueeze(1), found["sin"].unsqueeze(1)) if len(found) == 2 else None


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rope: str) -> tuple[Tensor, Tensor]:
    if rope == "on no head":
        return q, k

    def turn(x: Tensor) -> Tensor:
        width = min(cos.shape[-1], x.shape[-1])
        turned, kept = x[..., :width], x[..., width:]
        if rope == "interleaved":
            c, s = (t[..., : width // 2].repeat_interleave(2, -1) for t in (cos, sin))
            swapped = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
            return torch.cat((turned * c + swapped * s, kept), -1)
        first, second = turned.chunk(2, -1)
        sign = -1 if rope == "turned the other way" else 1
        return torch.cat((turned * cos + sign * torch.cat((-second, first), -1) * sin, kept), -1)

    return (q if rope == "on keys only" else turn(q)), (k if rope == "on queries only" else turn(k))


# -- MLP and residual stream ------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "no activation": lambda x: x,
}


def _activation(scene: Scene) -> str:
    gate, up = (scene.expected.get(Point(f"{scene.siblings}{name}", "output")) for name in ("gate_proj", "up_proj"))
    if up is None:
        return "the activation is another one"
    found = []
    for trace in (scene.expected, scene.actual):
        goal, options = trace[scene.point], []
        for name, act in ACTIVATIONS.items():
            if gate is None:
                options.append(({"activation": name}, act(up)))
            else:
                options.append(({"activation": name, "gate and up": "in order"}, act(gate) * up))
                options.append(({"activation": name, "gate and up": "swapped"}, act(up) * gate))
                options.append(({"activation": name, "gate and up": "up left out"}, act(gate)))
        found.append(next((setting for setting, value in options if same(goal, value)), None))
    return _contrast(*found)


def _residual(scene: Scene) -> str:
    """How the tensor is put together from the outputs before it."""
    goals = [trace[scene.point] for trace in (scene.expected, scene.actual)]
    before: dict[str, Tensor] = {}
    for point, value in scene.expected.items():
        if point == scene.point:
            break
        if point.side == "output" and value.shape == goals[0].shape:
            # a module whose output is its last part's: one column twice would make the sum ambiguous
            before = {name: other for name, other in before.items() if not torch.equal(other, value)}
            before[point.module] = value
    if not before:
        return UNKNOWN
    # from the latest back, until the reference's own value is explained
    names = list(before)[::-1][:8]
    for count in range(1, len(names) + 1):
        chosen = names[:count]
        basis = torch.stack([before[name].flatten() for name in chosen], -1)
        fits = [torch.linalg.lstsq(basis, goal.flatten()[:, None]).solution for goal in goals]
        if same((basis @ fits[0])[:, 0], goals[0].flatten()):
            if not same((basis @ fits[1])[:, 0], goals[1].flatten()):
                return "it is not a sum of the same outputs"
            lines = [
                f"{name} counts {b:.6g} times instead of {a:.6g} times"
                for name, a, b in zip(chosen, fits[0][:, 0].tolist(), fits[1][:, 0].tolist(), strict=True)
                if abs(a - b) > 1e-8
            ]
            return "; ".join(lines) + ": a residual connection or a multiplier is wrong"
    return UNKNOWN


def _contrast(expected: Mapping[str, Any] | None, actual: Mapping[str, Any] | None) -> str:
    """The settings in which the two differ, in words."""
    if expected is None:
        return "the reference computes something unknown here"
    if actual is None:
        return UNKNOWN
    lines = [
        f"{name}: {actual[name]} instead of {expected[name]}" for name in expected if expected[name] != actual[name]
    ]
    return "; ".join(lines) or UNKNOWN


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
