"""What the library calls of Transformer Engine 2.20, in plain operations, for machines that have no GPU.

It checks the arguments as the package does. What the package computes of them, ``tests/gpu/test_te.py`` compares.
"""

import io
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_automodel.components.models.common import capabilities
from nemo_automodel.components.models.common.te import attention, engine, float8, modules, rope


class Recipes:
    """The state of `autocast`: the recipes that are entered, outermost first, and how often the outermost was left."""

    entered: ClassVar[list[Any]] = []
    passes = 0


class autocast:
    def __init__(self, enabled: bool = True, recipe: Any = None) -> None:
        self.recipe = recipe if enabled else None

    def __enter__(self) -> None:
        Recipes.entered.append(self.recipe)

    def __exit__(self, *error: Any) -> None:
        Recipes.entered.pop()
        Recipes.passes += self.recipe is not None and not Recipes.entered and torch.is_grad_enabled()


def active() -> Any:
    """The recipe in use, None where there is none."""
    return Recipes.entered[-1] if Recipes.entered else None


class _Module(nn.Module):
    def get_extra_state(self) -> Any:
        return io.BytesIO(b"pickled")

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("loaded by nobody")


class Linear(_Module):
    def __init__(self, in_features: int, out_features: int, bias: bool = True, device: str = "cuda") -> None:
        super().__init__()
        assert device == "meta"
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device)) if bias else torch.empty(0)
        self.use_bias, self.fp8_meta = bias, {}
        self.seen: list[Any] = []

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        length = active().amax_history_len
        for way, count in (("fwd", 3), ("bwd", 2)) if not self.fp8_meta else ():
            state = SimpleNamespace(scale=torch.ones(count), amax_history=torch.zeros(length, count))
            self.fp8_meta[f"scaling_{way}"] = state

    def forward(self, inp: Tensor) -> Tensor:
        self.seen.append(active())
        if active() is not None:
            assert inp[..., 0].numel() % 8 == 0
            assert inp.shape[-1] % 16 == 0
        if active() is not None and active().kind == "DelayedScaling":
            self.init_fp8_metadata()
            self.fp8_meta["scaling_fwd"].amax_history[0, 0] = inp.detach().abs().max()
        return F.linear(inp, self.weight, self.bias if self.use_bias else None)


class _Norm(_Module):
    def __init__(self, dim: int, eps: float = 1e-5, zero_centered_gamma: bool = False, device: Any = None) -> None:
        super().__init__()
        assert device == "meta"
        self.weight = nn.Parameter(torch.empty(dim, device=device))
        self.dim, self.eps, self.offset = dim, eps, float(zero_centered_gamma)


class RMSNorm(_Norm):
    def forward(self, inp: Tensor) -> Tensor:
        weight = self.weight.float() + self.offset
        return F.rms_norm(inp.float(), (self.dim,), weight, self.eps).to(self.weight.dtype)


class LayerNorm(_Norm):
    def forward(self, inp: Tensor) -> Tensor:
        weight = self.weight.float() + self.offset
        return F.layer_norm(inp.float(), (self.dim,), weight, self.bias.float(), self.eps).to(self.weight.dtype)


class DotProductAttention(_Module):
    def __init__(self, heads: int, head_dim: int, *, num_gqa_groups: int, window_size: Any, **options: Any) -> None:
        super().__init__()
        self.sizes, self.window_size, self.options = (heads, num_gqa_groups, head_dim), window_size, options

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **layout: Any) -> Tensor:
        assert active() is None
        if layout == {"qkv_format": "bshd", "attn_mask_type": "causal"}:
            assert query.ndim == 4
            rows = [self._attend(*one) for one in zip(query, key, value, strict=True)]
            return torch.stack(rows).flatten(2)
        assert layout["qkv_format"] == "thd"
        assert layout["attn_mask_type"] == "padding_causal"
        assert query.ndim == 3
        bounds = layout["cu_seqlens_q"]
        assert torch.equal(bounds, layout["cu_seqlens_kv"])
        assert bounds.dtype == torch.int32
        assert layout["max_seqlen_q"] == layout["max_seqlen_kv"] >= bounds.diff().max()
        parts = [x.split(bounds.diff().tolist()) for x in (query, key, value)]
        return torch.cat([self._attend(*one) for one in zip(*parts, strict=True)]).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads, groups, head_dim = self.sizes
        assert query.shape[1:] == (heads, head_dim)
        assert key.shape[1:] == value.shape[1:] == (groups, head_dim)
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        behind = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        left, right = self.window_size
        seen = (behind >= -right) & (behind <= left if left >= 0 else behind == behind)
        k, v = (x.repeat_interleave(heads // groups, 0) for x in (k, v))
        options = {"scale": self.options["softmax_scale"], "dropout_p": self.options["attention_dropout"]}
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, **options).transpose(0, 1)


def apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, *, tensor_format: str, fused: bool, cu_seqlens: Tensor | None = None
) -> Tensor:
    assert fused
    assert freqs.dtype == torch.float32
    assert freqs.shape[1:3] == (1, 1)
    if tensor_format == "thd":
        assert cu_seqlens is not None
        assert cu_seqlens.tolist() == [0, len(t)] == [0, len(freqs)]
        freqs = freqs[:, 0]
    else:
        assert tensor_format == "bshd"
        assert len(freqs) == t.shape[1]
        freqs = freqs[None, :, 0]
    turning = freqs.shape[-1]
    turned, kept = t[..., :turning].float(), t[..., turning:]
    first, second = turned.chunk(2, -1)
    turned = turned * freqs.cos() + torch.cat((-second, first), -1) * freqs.sin()
    return torch.cat((turned.to(t.dtype), kept), -1)


def _recipe(kind: str) -> Any:
    return lambda fp8_format="own", amax_history_len=1024: SimpleNamespace(
        kind=kind, fp8_format=fp8_format, amax_history_len=amax_history_len
    )


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the package, on any device."""
    kinds = (Linear, RMSNorm, LayerNorm, DotProductAttention, autocast)
    recipe = {name: _recipe(name) for name in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling")}
    formats = SimpleNamespace(HYBRID="HYBRID", E4M3="E4M3")
    package: dict[str, dict[str, Any]] = {
        "transformer_engine": {},
        "transformer_engine.common": {},
        "transformer_engine.common.recipe": {**recipe, "Format": formats},
        "transformer_engine.pytorch": {kind.__name__: kind for kind in kinds},
        "transformer_engine.pytorch.attention": {},
        "transformer_engine.pytorch.attention.rope": {"apply_rotary_pos_emb": apply_rotary_pos_emb},
    }
    for name, content in package.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
    monkeypatch.setattr(capabilities.Package, "installed", lambda self: True)
    for place in (engine, float8, modules, rope):
        monkeypatch.setattr(place, "refuse_off_gpu", lambda x=None: None)
    own = capabilities.BY_IMPLEMENTATION["te"]
    table = replace(own, on={capabilities.ANY: own.on["cuda"]._replace(dtypes=capabilities.DOUBLE, compute=(0, 0))})
    for names in (capabilities.BY_IMPLEMENTATION, capabilities.ATTENTIONS):
        monkeypatch.setitem(names, "te", table)
    for made in (float8._recipe, attention.dot_product, engine.package):
        made.cache_clear()
    Recipes.entered.clear()
    Recipes.passes = 0
