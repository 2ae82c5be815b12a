"""Inputs for every kernel, and how far from float64 it and its reference are: for the interpreter, and for a GPU."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_automodel.components.kernels import add_norm as norm_module
from nemo_automodel.components.kernels import gated as gated_module
from nemo_automodel.components.kernels import linear as linear_module
from nemo_automodel.components.kernels import linear_cross_entropy as loss_module
from nemo_automodel.components.kernels import qkv_rope as rope_module
from nemo_automodel.components.kernels import tied as tied_module
from nemo_automodel.components.kernels.add_norm import add_norm, add_norm_reference
from nemo_automodel.components.kernels.float8 import quantized_reference
from nemo_automodel.components.kernels.gated import gated, gated_reference
from nemo_automodel.components.kernels.launch import runs_on
from nemo_automodel.components.kernels.linear import Gated, Normed, linear
from nemo_automodel.components.kernels.linear_cross_entropy import (
    IGNORE,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from nemo_automodel.components.kernels.qkv_rope import HeadNorms, split_and_turn, split_and_turn_reference
from nemo_automodel.components.kernels.tied import embed_tied
from nemo_automodel.components.layout import GATE_UP, Fusion, qkv_fusion
from nemo_automodel.components.peft.config import Update
from nemo_automodel.components.peft.lora import LoRALinear

BF16, FP32 = torch.bfloat16, torch.float32
EPS = 1e-5


@dataclass
class Case:
    """A kernel's function, its reference, and inputs for both; those that require gradients get them."""

    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: list[Tensor | None]
    layers: Sequence[nn.Module] = ()

    def outcome(self, function: Callable[..., Any], inputs: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Outputs, and gradients for random gradients of the outputs."""
        out = function(*inputs)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        wanted = {f"gradient {i}": x for i, x in enumerate(inputs) if x is not None and x.requires_grad}
        grads = torch.autograd.grad(outs, list(wanted.values()), [_gradient(o, i) for i, o in enumerate(outs)])
        return {**{f"output {i}": o.detach() for i, o in enumerate(outs)}, **dict(zip(wanted, grads, strict=True))}

    def exact(self) -> dict[str, Tensor]:
        """The reference in float64."""
        return self.outcome(self.reference, [_copy(x, torch.float64) for x in self.inputs])

    def errors(self, function: Callable[..., Any] | None = None) -> dict[str, float]:
        """Of the kernel, or ``function``: relative distances from float64."""
        actual = self.outcome(function or self.kernel, self.inputs)
        truth = self.exact()
        assert actual.keys() == truth.keys()
        for name, value in actual.items():
            assert value.shape == truth[name].shape, name
        return {name: distance(value, truth[name]) for name, value in actual.items()}


def assert_near(case: Case, ratio: float = 1.1) -> None:
    """As near as the reference is in the same dtype, or within some ten roundings of fp32."""
    ours, theirs = case.errors(), case.errors(case.reference)
    too_far = {name: (e, theirs[name]) for name, e in ours.items() if e > ratio * theirs[name] + 2**-20}
    assert not too_far, f"(kernel, reference): {too_far}"


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), f"{name}: {distance(actual[name], value)} apart"


def assert_graph_rules(case: Case) -> None:
    """Autograd's: backward again where the graph is kept, refused where not, and never twice differentiable."""
    x = case.inputs[0]
    assert x is not None

    def loss() -> Tensor:
        out = case.kernel(*case.inputs)
        outs = out if isinstance(out, tuple) else (out,)
        return torch.stack([o.float().square().sum() for o in outs]).sum()

    kept = loss()
    first, second = (torch.autograd.grad(kept, x, retain_graph=again)[0] for again in (True, False))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(kept, x)
    (gradient,) = torch.autograd.grad(loss(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def assert_noticed(case: Case, changed: int, outcome: bool = False) -> None:
    """An input (or the first output) that changes between forward and backward is an error, not another gradient."""
    out = case.kernel(*case.inputs)
    outs = out if isinstance(out, tuple) else (out,)
    target = outs[0] if outcome else case.inputs[changed]
    assert target is not None
    with torch.no_grad():
        target.add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.stack([o.float().sum() for o in outs]).sum().backward()


def distance(actual: Tensor, truth: Tensor) -> float:
    """Relative, in the Euclidean norm; infinite where there is a NaN."""
    if not truth.numel():
        return 0.0
    norm = truth.double().norm().item()
    away = (actual.double() - truth.double()).norm().item()
    return float("inf") if away != away else away / norm if norm else away


def values(
    *shape: int, dtype: torch.dtype, device: Any = "cpu", scale: float = 1.0, strided: bool = False, grad: bool = True
) -> Tensor:
    """Random ones; ``strided``: a view of wider memory, whose rows start anywhere."""
    whole = torch.randn(*shape[:-1], shape[-1] + (3 if strided else 0), device=device) * scale
    whole = whole.to(dtype)
    return (whole[..., 2:-1] if strided else whole).detach().requires_grad_(grad)


def gated_case(*shape: int, activation: str = "silu", strided: bool = False, **to: Any) -> Case:
    """``shape`` is the output's."""
    x = values(*shape[:-1], 2 * shape[-1], strided=strided, scale=2.0, **to)
    return Case(partial(gated, activation=activation), partial(gated_reference, activation=activation), [x])


def norm_case(
    *shape: int, branch: bool = True, offset: float = 0.0, frozen: bool = False, strided: bool = False, **to: Any
) -> Case:
    """``frozen``: the weight."""
    inputs = [
        values(*shape, strided=strided, **to),
        values(*shape, strided=strided, **to) if branch else None,
        values(shape[-1], grad=not frozen, **to),
    ]

    def kernel(x: Tensor, branch: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        total, normed, rstd = add_norm(x, branch, weight, EPS, offset)
        assert rstd is not None, "the kernel did not run"
        return total, normed

    return Case(kernel, lambda x, branch, weight: add_norm_reference(x, branch, weight, EPS, offset), inputs)


def rope_case(
    batch: int,
    sequence: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    rotary: int | None = None,
    *,
    shared: bool = True,
    strided: bool = False,
    norms: bool | str = False,
    offset: float = 0.0,
    **to: Any,
) -> Case:
    """``shared``: one table for all of the batch; ``norms``: of heads, "frozen" or not."""
    qkv = values(batch, sequence, kv_heads * (group + 2) * head_dim, strided=strided, **to)
    half = (head_dim if rotary is None else rotary) // 2
    angle = values(1 if shared else batch, sequence, half, grad=False, **to).float()
    tables = [function(torch.cat((angle, angle), -1)).to(qkv.dtype) for function in (torch.cos, torch.sin)]
    shapes = {"group": group, "head_dim": head_dim}
    weights = [values(head_dim, grad=norms != "frozen", **to) for _ in range(2 if norms else 0)]

    def on_heads(function: Callable[..., Any], qkv: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> Any:
        return function(qkv, cos, sin, **shapes, norms=HeadNorms(*weights, EPS, offset) if weights else None)

    functions = [partial(on_heads, function) for function in (split_and_turn, split_and_turn_reference)]
    return Case(*functions, [qkv, *tables, *weights])


def loss_case(
    rows: int,
    width: int,
    vocabulary: int,
    multiplier: float = 1.0,
    softcap: float | None = None,
    *,
    frozen: bool = False,
    ignored: slice = slice(0, None, 7),
    **to: Any,
) -> Case:
    """``frozen``: the head; ``ignored``: rows that predict nothing."""
    hidden = values(rows, width, **to)
    weight = values(vocabulary, width, scale=2 * width**-0.5, grad=not frozen, **to)
    targets = torch.randint(0, vocabulary, (rows,)).to(hidden.device)
    targets[ignored] = IGNORE
    fixed = {"targets": targets, "multiplier": multiplier, "softcap": softcap}
    return Case(
        lambda h, w: linear_cross_entropy(h, w, **fixed),
        lambda h, w: linear_cross_entropy_reference(h, w, **fixed),
        [hidden, weight],
    )


def tied_case(ids: Tensor, vocabulary: int, n: int, *, padding: int | None = None, **to: Any) -> Case:
    """Embeddings of ``ids`` and logits of other rows, so that both uses of the weight have gradients."""
    weight, hidden = values(vocabulary, n, **to), values(5, n, grad=False, **to)
    ids = ids.to(weight.device)

    def ours(weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        embeddings, head = embed_tied(ids, weight, padding)
        return embeddings, F.linear(hidden, head)

    def reference(weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return F.embedding(ids, weight, padding), F.linear(hidden, weight)

    return Case(ours, reference, [weight, hidden])


QKV = qkv_fusion(6, 2, 4)
"""Two groups of 12 + 4 + 4 rows."""


def rows_of(fusion: Fusion, part: str, total: int) -> Tensor:
    """Where the part's rows stand in the fused projection, from what the layouts' specification says."""
    groups = torch.arange(total).unflatten(0, (-1, sum(fusion.blocks)))
    start = sum(fusion.blocks[: fusion.parts.index(part)])
    return groups[:, start : start + fusion.blocks[fusion.parts.index(part)]].flatten()


def linear_case(
    rows: Sequence[int],
    width: int,
    out: int = 40,
    recipe: str | None = None,
    *,
    bias: bool = False,
    frozen: bool = False,
    norm_frozen: bool = False,
    fusion: Fusion | None = None,
    ranks: dict[str, int] | None = None,
    joined: bool = False,
    room: int = 0,
    float8: bool = False,
    **to: Any,
) -> Case:
    """``recipe``: None, "silu", "gelu_pytorch_tanh" or "normed". ``ranks``: adapters on these parts, else none.

    ``float8``: of the frozen weight under them; the reference rounds the same operands, and nothing else.
    """
    weight = values(out, width, scale=width**-0.5, grad=not frozen and ranks is None, **to)
    bias_value = values(out, grad=ranks is None, **to) if bias else None
    layer, adapters = None, []
    if ranks is not None:
        layer = _layer(weight, bias_value, fusion, ranks)
        adapters = [*layer.lora_A.values(), *layer.lora_B.values()]
        if joined:
            layer.join()
        if float8:
            layer.quantize()
        weight, bias_value = layer.weight, layer.bias
    inputs: list[Tensor | None]
    if recipe == "normed":
        inputs = [values(*rows, width, **to), values(*rows, width, **to), values(width, grad=not norm_frozen, **to)]
    elif recipe is not None:
        inputs = [values(*rows, 2 * width, **to)]
    else:
        inputs = [values(*rows, width, **to)]
    given = len(inputs)

    def kernel(*inputs: Tensor) -> Any:
        total, x = made(inputs[:given], recipe, room)
        if layer is not None:
            assert layer._fuses(x), "the kernels do not run"
            y = layer(x)
        else:
            y = linear(x, *inputs[given : given + 2])
        return y if total is None else (total, y)

    def reference(*inputs: Tensor) -> Any:
        if recipe == "normed":
            total, x = add_norm_reference(*inputs[:3], EPS, 1.0)
        else:
            total, x = None, inputs[0] if recipe is None else gated_reference(inputs[0], recipe)
        if float8:
            assert layer is not None
            y = _InFloat8.apply(x, layer.weight, layer.scale, to["dtype"])
            y = y if layer.bias is None else y + inputs[given + 1]
        else:
            y = F.linear(x, *inputs[given : given + 2])
        if layer is not None:
            a, b = inputs[given + 2 :][: len(layer.updates)], inputs[given + 2 :][len(layer.updates) :]
            for (part, update), a_part, b_part in zip(layer.updates.items(), a, b, strict=True):
                added = update.alpha / update.r * F.linear(F.linear(x, a_part), b_part)
                at = torch.arange(out) if fusion is None else rows_of(fusion, part, out)
                y = y.index_add(-1, at.to(y.device), added)
        return y if total is None else (total, y)

    return Case(kernel, reference, [*inputs, weight, bias_value, *adapters])


class _InFloat8(torch.autograd.Function):
    """``x W^T`` and its gradient, with operands rounded to float8 as they are in ``dtype``, and exact but for that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.dtype = dtype
        return _InFloat8.product(x, None, dtype, codes.double() * scale.double())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scale = ctx.saved_tensors
        return _InFloat8.product(grad, scale.squeeze(1), ctx.dtype, codes.double().t()), None, None, None

    @staticmethod
    def product(x: Tensor, columns: Tensor | None, dtype: torch.dtype, matrix: Tensor) -> Tensor:
        rows, scale = quantized_reference(x.flatten(0, -2).to(dtype), columns)
        return ((rows.double() * scale.double()) @ matrix.t()).view(*x.shape[:-1], -1).to(x.dtype)


def mlp_case(
    *rows: int, hidden: int = 16, width: int = 24, ranks: dict[str, int], joined: bool = False, **to: Any
) -> Case:
    """Adapters in both layers of a gated MLP: ``ranks`` of "gate_proj" and "up_proj", 8 of the other."""
    weights = values(2 * width, hidden, scale=hidden**-0.5, **to), values(hidden, width, scale=width**-0.5, **to)
    layers = _layer(weights[0], None, GATE_UP, ranks), _layer(weights[1], None, None, {"down_proj": 8})
    adapters = [p for layer in layers for p in (*layer.lora_A.values(), *layer.lora_B.values())]
    for layer in layers if joined else ():
        layer.join()

    def kernel(x: Tensor, *_: Tensor) -> Any:
        return layers[1](Gated(layers[0](x), "silu"))

    def reference(x: Tensor, *adapters: Tensor) -> Tensor:
        both = [weight.detach().to(x.dtype) for weight in weights]
        gate_up, left = F.linear(x, both[0]), iter(adapters)
        a, b = ([next(left) for _ in ranks] for _ in range(2))
        for (part, update), a_part, b_part in zip(layers[0].updates.items(), a, b, strict=True):
            at = rows_of(GATE_UP, part, 2 * width).to(x.device)
            gate_up = gate_up.index_add(-1, at, update.scale * F.linear(F.linear(x, a_part), b_part))
        x = gated_reference(gate_up, "silu")
        return F.linear(x, both[1]) + layers[1].updates["down_proj"].scale * F.linear(
            F.linear(x, next(left)), next(left)
        )

    return Case(kernel, reference, [values(*rows, hidden, **to), *adapters], layers)


def _layer(weight: Tensor, bias: Tensor | None, fusion: Fusion | None, ranks: dict[str, int]) -> LoRALinear:
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(weight.detach(), requires_grad=False)
    base.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    updates = {part: Update(r=r, alpha=3.0 + i) for i, (part, r) in enumerate(ranks.items())}
    layer = LoRALinear(base, next(iter(ranks)), updates, fusion)
    with torch.no_grad():
        for parameter in (*layer.lora_A.values(), *layer.lora_B.values()):
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
    return layer


def made(inputs: Sequence[Tensor], recipe: str | None, room: int) -> tuple[Tensor | None, Any]:
    """The residual stream, where there is one, and what the layer reads; as `RMSNorm.with_residual` makes it."""
    if recipe is None:
        return None, inputs[0]
    if recipe != "normed":
        return None, Gated(inputs[0], recipe)
    total, normed, rstd = add_norm(*inputs, EPS, 1.0, room)
    assert rstd is not None
    Normed(total, inputs[2], rstd, EPS, 1.0, room).mark(normed)
    return total, normed


def _gradient(output: Tensor, seed: int) -> Tensor:
    """The same numbers in every dtype and on every device; one for a loss, as training has it."""
    if not output.ndim:
        return torch.ones_like(output)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, generator=generator).bfloat16().to(output.device, output.dtype)


def _copy(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.detach().to(dtype).requires_grad_(x.requires_grad)


LINEARS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, bias": {"bias": True},
    "gated": {"recipe": "silu"},
    "gated, bias": {"recipe": "gelu_pytorch_tanh", "bias": True},
    "gated, frozen": {"recipe": "silu", "frozen": True},
    "normed": {"recipe": "normed"},
    "normed, bias": {"recipe": "normed", "bias": True},
    "normed, frozen": {"recipe": "normed", "frozen": True},
    "normed, norm frozen": {"recipe": "normed", "norm_frozen": True},
}
"""Layers without adapters, for `linear_case`."""

ADAPTED: dict[str, dict[str, Any]] = {
    "plain": {"ranks": {"o_proj": 8}},
    "plain, bias": {"ranks": {"o_proj": 8}, "bias": True},
    "gated": {"ranks": {"down_proj": 8}, "recipe": "silu"},
    "gated, bias": {"ranks": {"down_proj": 24}, "recipe": "gelu_pytorch_tanh", "bias": True},
    "normed gate_up": {"ranks": {"gate_proj": 8, "up_proj": 16}, "fusion": GATE_UP, "recipe": "normed"},
    "normed qkv, bias": {
        "ranks": {"q_proj": 8, "k_proj": 8, "v_proj": 16},
        "fusion": QKV,
        "recipe": "normed",
        "bias": True,
    },
    "normed q and v": {"ranks": {"q_proj": 8, "v_proj": 8}, "fusion": QKV, "recipe": "normed", "norm_frozen": True},
    "up alone": {"ranks": {"up_proj": 8}, "fusion": GATE_UP},
}
"""Layers with adapters; norms of adapted models are frozen, but need not be."""

ODD: dict[str, Callable[..., Case]] = {
    "gated": partial(gated_case, 3, 37),
    "gated, one row of one": partial(gated_case, 1, 1),
    "gated, strided": partial(gated_case, 2, 5, 1030, activation="gelu_pytorch_tanh", strided=True),
    "norm": partial(norm_case, 5, 37, offset=1.0),
    "norm, no branch": partial(norm_case, 2, 3, 600, branch=False),
    "norm, frozen, strided": partial(norm_case, 7, 65, frozen=True, strided=True),
    "norm, one row of one": partial(norm_case, 1, 1),
    "rope": partial(rope_case, 2, 21, 3, 2, 64),
    "rope, partial": partial(rope_case, 2, 7, 1, 1, 80, 32, shared=False),
    "rope, odd halves, strided": partial(rope_case, 1, 17, 2, 3, 96, 22, strided=True),
    "rope, normed": partial(rope_case, 2, 21, 3, 2, 64, norms=True),
    "rope, normed, partial, frozen": partial(rope_case, 2, 7, 1, 1, 80, 32, norms="frozen", offset=1.0, strided=True),
    "rope, normed, one token": partial(rope_case, 1, 1, 2, 1, 96, 22, norms=True),
    "rope, one token": partial(rope_case, 1, 1, 1, 8, 256),
    "loss": partial(loss_case, 29, 24, 61),
    "loss, capped": partial(loss_case, 5, 16, 9001, 0.7, 3.0),
    "loss, frozen": partial(loss_case, 1, 8, 13, frozen=True, ignored=slice(0)),
    "loss, nothing to predict": partial(loss_case, 4, 8, 13, ignored=slice(None)),
    **{f"linear, {name}": partial(linear_case, (3, 5), 24, **options) for name, options in LINEARS.items()},
    **{f"adapters, {name}": partial(linear_case, (3, 7), 40, **options) for name, options in ADAPTED.items()},
    **{
        f"joined adapters, {name}": partial(linear_case, (3, 7), 40, joined=True, room=32, **options)
        for name, options in ADAPTED.items()
    },
    "tied embeddings": partial(tied_case, torch.tensor([[3, 0, 8, 8], [3, 3, 1, 3]]), 9, 37, padding=1),
    "adapters, both layers of an MLP": partial(mlp_case, 3, 7, ranks={"gate_proj": 8, "up_proj": 16}),
}
"""Every kernel on small and odd shapes."""


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each kernel's autograd function is called from now on."""
    calls: dict[str, int] = {}
    for name, function in {
        "gated": gated_module._Gated,
        "norm": norm_module._AddNorm,
        "rope": rope_module._SplitAndTurn,
        "linear": linear_module._Linear,
        "loss": loss_module._LinearCrossEntropy,
        "tied": tied_module._EmbedTied,
    }.items():

        def apply(*args: Any, name: str = name, function: Any = function) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return super(function, function).apply(*args)

        monkeypatch.setattr(function, "apply", staticmethod(apply))
    return calls


@torch.no_grad()
def learnt(
    device: str = "cpu", *, join: bool = False, float8: bool = False, gated: bool = False, **options: Any
) -> float:
    """How much of an update as small as AdamW's first a layer's output in bf16 shows in the mean: 1 is all of it.

    ``gated``: the input is one that a kernel makes, with room for what is joined.
    """
    torch.manual_seed(0)
    base = linear_module.Linear(512, 768, dtype=BF16, device=device).requires_grad_(False)
    base.kernels = options.pop("kernels", True)
    nn.init.normal_(base.weight, std=0.02)
    nn.init.normal_(base.bias)
    layer = LoRALinear(base, "up_proj", {"up_proj": Update(16, 32.0)}, None, **options)
    a, b = layer.lora_A["up_proj"], layer.lora_B["up_proj"]
    nn.init.uniform_(a, -(512**-0.5), 512**-0.5)
    for magnitude in layer.lora_magnitude.values():
        magnitude.copy_(layer.weight.norm(dim=1))
    if float8:
        layer.quantize()
    elif join:
        layer.join()
    given: Any = torch.randn(512, 1024 if gated else 512, device=device).to(BF16) * (2 if gated else 1)
    given = Gated(given, "silu") if gated else given
    assert layer._fuses(given) is (not layer.dora and (float8 or (base.kernels and runs_on(b))))
    x = linear_module.made(given).double()
    outputs = []
    for value in (0.0, 1e-5):
        b.copy_(torch.randn(b.shape, device=device).sign() * value)
        outputs.append(layer(given).double())
    exact = 2.0 * x @ a.double().t() @ b.double().t()
    return (((outputs[1] - outputs[0]) * exact).sum() / exact.square().sum()).item()


LEARNT: list[dict[str, bool]] = [
    {},
    {"gated": True},
    {"join": True},
    {"join": True, "gated": True},
    {"float8": True},
    {"float8": True, "gated": True},
    {"dora": True},
]
"""Layers that kernels compute, all or in part."""
