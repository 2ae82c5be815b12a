"""`BackendConfig` and the two modules it chooses."""

import copy
import re
from dataclasses import asdict
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM as HFLlama

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.models.common import (
    BackendConfig,
    initialize_linear_module,
    initialize_rms_norm_module,
)
from nemo_automodel.components.models.common.backend import CHOICES
from nemo_automodel.components.models.common.capabilities import Package
from nemo_automodel.components.models.common.norm import RMSNorm
from nemo_automodel.components.models.llama import LlamaForCausalLM
from tests.conftest import tiny, tokens

DEFAULTS = {"attn": "sdpa", "linear": "torch", "rms_norm": "torch", "rope_fusion": False, "kernels": "auto"}
DEFAULTS |= {"te_fp8": None}
TE = ("attn", "linear", "rms_norm", "rope_fusion")
BAD = {
    "attn": ("flash", "SDPA", None, True),
    "linear": ("fp8", "", 1),
    "rms_norm": ("torch_bf16", None, ["torch"]),
    "rope_fusion": ("yes", 1, 0, None),
    "kernels": ("triton", None, True),
}


def test_defaults_and_every_good_value():
    assert asdict(BackendConfig()) == DEFAULTS
    good = [("attn", "flex"), ("attn", "varlen"), ("attn", "auto"), ("rms_norm", "torch_fp32"), ("kernels", "torch")]
    for field, value in good:
        assert asdict(BackendConfig(**{field: value})) == DEFAULTS | {field: value}
    with pytest.raises(TypeError, match="positional"):
        BackendConfig("sdpa")


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_bad_values_are_refused_by_field_name(field, value):
    for build in (lambda: BackendConfig(**{field: value}), lambda: BackendConfig.of({field: value})):
        with pytest.raises(ValueError, match=re.escape(f"backend.{field}={value!r} is not one of ")):
            build()


@pytest.mark.parametrize("field", TE)
def test_transformer_engine_missing(field, monkeypatch):
    monkeypatch.setattr(Package, "installed", lambda self: False)
    with pytest.raises(ImportError, match=rf"backend\.{field}=.*needs Transformer Engine.*pip install .*transformer_e"):
        BackendConfig(**{field: True if field == "rope_fusion" else "te"})


@pytest.mark.parametrize("name", ["flash2", "flash3", "flash4"])
def test_flash_attention_missing(name, monkeypatch):
    monkeypatch.setattr(Package, "installed", lambda self: False)
    with pytest.raises(
        ImportError, match=rf"'{name}' needs FlashAttention {name[-1]}, which is not .*: pip install .*,"
    ):
        BackendConfig(attn=name)
    monkeypatch.setattr(Package, "installed", lambda self: True)
    config = tiny()
    BackendConfig(attn=name).apply_to(config)
    assert config._attn_implementation == f"flash_attention_{name[-1]}"


def test_the_type_names_every_choice():
    hints = get_type_hints(BackendConfig)
    for field, choices in CHOICES.items():
        assert set(get_args(hints[field]) or (False, True)) == set(choices)


def test_from_dict_none_and_other_types():
    backend = BackendConfig(attn="flex")
    assert BackendConfig.of(backend) is backend
    assert BackendConfig.of(None) == BackendConfig()
    assert BackendConfig.of({"attn": "flex"}) == backend
    with pytest.raises(ValueError, match=r"backend\.atn is not a field of BackendConfig: attn, kernels, linear"):
        BackendConfig.of({"atn": "flex"})
    with pytest.raises(TypeError, match="not str"):
        BackendConfig.of("sdpa")


@pytest.mark.parametrize(
    ("configured", "backend", "argument", "expected"),
    [
        (None, {}, None, "sdpa"),
        (None, {"attn": "flex"}, None, "flex_attention"),
        ("eager", {}, None, "eager"),
        ("eager", {"attn": "flex"}, None, "flex_attention"),
        ("eager", {"attn": "flex"}, "sdpa", "sdpa"),
        ("sdpa", {"attn": "flex"}, "eager", "eager"),
        (None, {}, "flex_attention", "flex_attention"),
        (None, {"attn": "auto"}, None, "sdpa"),
        ("eager", {"attn": "auto"}, None, "eager"),
        (None, {"attn": "varlen"}, None, "varlen"),
        ("varlen", {}, "eager", "eager"),
        (None, {}, "varlen", "varlen"),
    ],
)
def test_who_decides_on_attention(configured, backend, argument, expected, tmp_path):
    config = tiny(attn=configured)
    LlamaForCausalLM(tiny()).save_pretrained(tmp_path)
    options = {"backend": backend, "attn_implementation": argument}
    for model in (
        NeMoAutoModelForCausalLM.from_config(config, **options),
        NeMoAutoModelForCausalLM.from_pretrained(tmp_path, config=config, **options),
        LlamaForCausalLM.from_pretrained(tmp_path, config=config, **options),
        *([LlamaForCausalLM(copy.deepcopy(config), backend)] if argument is None else []),
    ):
        assert model.config._attn_implementation == expected
        assert model.model.layers[0].self_attn.config is model.config
    assert config._attn_implementation == configured, "the caller's config is left alone"


def test_the_model_keeps_and_uses_its_backend():
    model = LlamaForCausalLM(tiny(), {"rms_norm": "torch_fp32"})
    assert model.backend == BackendConfig(rms_norm="torch_fp32")
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 5
    assert all(norm.fp32 for norm in norms)
    assert not any(m.fp32 for m in LlamaForCausalLM(tiny()).modules() if isinstance(m, RMSNorm))


@pytest.mark.parametrize("implementation", ["torch", "torch_fp32"])
def test_rms_norm_equals_transformers(implementation):
    reference = HFLlama(tiny()).model.norm
    norm = initialize_rms_norm_module(implementation, 32, eps=reference.variance_epsilon)
    weight, x = torch.randn(32), torch.randn(5, 32)
    results = []
    for module in (reference, norm):
        leaf = x.clone().requires_grad_()
        module.weight.data.copy_(weight)
        module(leaf).sin().sum().backward()
        results.append((module(x), leaf.grad, module.weight.grad))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # a handful of fp32 roundings


MAKERS = {
    "norm": lambda **kwargs: initialize_rms_norm_module("torch", 8, **kwargs),
    "norm, fp32": lambda **kwargs: initialize_rms_norm_module("torch_fp32", 8, **kwargs),
    "linear": lambda **kwargs: initialize_linear_module("torch", 8, 6, bias=True, **kwargs),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_device_and_dtype(make):
    def kinds(module: nn.Module) -> set:
        return {(parameter.device.type, parameter.dtype) for parameter in module.parameters()}

    assert kinds(make()) == {("cpu", torch.float32)}
    assert kinds(make(device="meta", dtype=torch.float16)) == {("meta", torch.float16)}
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert kinds(make()) == {("meta", torch.bfloat16)}
        assert kinds(make(dtype=torch.float32)) == {("cpu", torch.float32)}
    finally:
        torch.set_default_dtype(torch.float32)


def test_linear_and_norm_defaults_and_refusals():
    assert initialize_linear_module("torch", 8, 6).bias is None
    assert initialize_linear_module("torch", 8, 6, bias=True).weight.shape == (6, 8)
    assert initialize_rms_norm_module("torch", 8).eps == 1e-5
    with pytest.raises(ValueError, match="linear_impl='fp8'"):
        initialize_linear_module("fp8", 8, 6)
    with pytest.raises(ValueError, match="rms_norm_impl='layer'"):
        initialize_rms_norm_module("layer", 8)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_layer_compiles_into_one_graph(attn):
    model = NeMoAutoModelForCausalLM.from_config(tiny(attn=attn)).train()
    ids = tokens(2, 7)
    gradients = []
    for compiled in (False, True):
        model.zero_grad()
        for layer in model.model.layers if compiled else ():
            layer.compile(fullgraph=True, backend="eager")
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients)
