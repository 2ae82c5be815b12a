"""Mistakes that people make, put into a right implementation one by one: each is caught, and called by its name."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, LlamaConfig, Qwen2Config, Qwen3Config

from nemo_automodel._transformers import registry
from nemo_automodel.components.layout import Fusion
from nemo_automodel.components.models.common import attention, decoder
from nemo_automodel.components.models.common.combined_projection import combined_qkv, state_dict_adapter
from nemo_automodel.components.models.common.rope import rotate_half
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.verify import Target
from nemo_automodel.verify.checks import all_checks
from nemo_automodel.verify.subject import Subject

LLAMA = {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 192, "vocab_size": 500}
SLIDING = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 2048,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **changes: LlamaConfig(**{**LLAMA, **changes}),
    "qwen2": lambda **changes: Qwen2Config(**{**LLAMA, **changes}),
}


class GemmaLikeLlama(decoder.DecoderForCausalLM):
    """Gemma but for its norms, which multiply by 1 + weight."""

    config_class = GemmaConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    @staticmethod
    def decoder_spec(config: GemmaConfig) -> DecoderSpec:
        types = ("full_attention",) * config.num_hidden_layers
        return DecoderSpec(
            norm_eps=config.rms_norm_eps, layer_types=types, embedding_multiplier=config.hidden_size**0.5
        )


class Qwen3LikeLlama(decoder.DecoderForCausalLM):
    """Qwen3 but for its norms on queries and keys."""

    config_class = Qwen3Config
    _keys_to_ignore_on_load_unexpected = (r"[qk]_norm",)

    @staticmethod
    def decoder_spec(config: Qwen3Config) -> DecoderSpec:
        return DecoderSpec(norm_eps=config.rms_norm_eps, layer_types=tuple(config.layer_types or ()))


class LlamaWithoutBias(registry.resolve("LlamaForCausalLM")):
    """It never looks whether the config asks for a bias."""

    @staticmethod
    def decoder_spec(config: LlamaConfig) -> DecoderSpec:
        return DecoderSpec(norm_eps=config.rms_norm_eps, layer_types=("full_attention",) * config.num_hidden_layers)


@dataclass
class Mutation:
    """One mistake.

    Attributes:
        caught_by: the check that must fail.
        says: what its detail must contain.
        change: makes it, on a model that was just loaded.
        patch: makes it, with monkeypatch, in the library's modules (transformers' are not touched).
        family: of the model.
        config: fields that differ from the family's.
        model_class: instead of the registered class.
    """

    caught_by: str
    says: str
    change: Callable[[Any], None] = lambda model: None
    patch: Callable[[pytest.MonkeyPatch], None] = lambda monkeypatch: None
    family: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    model_class: Any = None


def on_layers(path: str, change: Callable[[Any], None]) -> Callable[[Any], None]:
    """Apply ``change`` to ``path`` of every layer."""
    return lambda model: [change(layer.get_submodule(path)) for layer in model.model.layers] and None


def interleaved(q: Any, k: Any, cos: Any, sin: Any, **_: Any) -> tuple[Any, Any]:
    c, s = (t[..., : t.shape[-1] // 2].repeat_interleave(2, -1).unsqueeze(1) for t in (cos, sin))
    swap = lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)  # noqa: E731
    return q * c + swap(q) * s, k * c + swap(k) * s


def turned_back(q: Any, k: Any, cos: Any, sin: Any, **_: Any) -> tuple[Any, Any]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos - rotate_half(q) * sin, k * cos - rotate_half(k) * sin


def half_split(x: Any, cos: Any, sin: Any) -> Any:
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)


def set_attribute(owner: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


def tiled_heads(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
    key, value = (x.repeat(1, module.num_key_value_groups, 1, 1) for x in (key, value))
    weights = torch.softmax(query @ key.transpose(2, 3) * scaling + mask, dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def mask_with(sees: Callable[[Any, Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Full-attention layers get a mask where query ``i`` sees key ``j`` if ``sees(i, j)``."""

    def make(config: Any, inputs_embeds: Any, **kwargs: Any) -> Any:
        at = torch.arange(inputs_embeds.shape[1])
        seen = sees(at[:, None], at[None])
        lowest = torch.finfo(inputs_embeds.dtype).min
        return torch.zeros(seen.shape, dtype=inputs_embeds.dtype).masked_fill(~seen, lowest)[None, None]

    return lambda monkeypatch: monkeypatch.setitem(decoder.MASKS, "full_attention", make)


def mask_without(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    original = decoder.MASKS["full_attention"]
    make = lambda **kwargs: original(**{**kwargs, name: None})  # noqa: E731
    return lambda monkeypatch: monkeypatch.setitem(decoder.MASKS, "full_attention", make)


def untie(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def tie(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def drop_bias(linear: Any) -> None:
    linear.bias = None


def add_bias(linear: Any) -> None:
    linear.bias = nn.Parameter(torch.full((linear.out_features,), 0.1, dtype=linear.weight.dtype))


def reverse_query_heads(qkv: Any) -> None:
    rows = qkv.weight.data.unflatten(0, (-1, 16))  # heads of a group: Q Q Q K V
    rows[[0, 1, 2]] = rows[[2, 1, 0]]


def interleave_query_rows(qkv: Any) -> None:
    rows = qkv.weight.data.unflatten(0, (-1, 16))
    rows[:3] = rows[:3].unflatten(1, (2, 8)).transpose(1, 2).flatten(1, 2)


def with_offset(norm: Any) -> None:
    norm.weight.data += 1


def centred(norm: Any) -> None:
    forward = norm.forward
    norm.forward = lambda x: forward(x - x.mean(-1, keepdim=True))


def in_low_precision(norm: Any) -> None:
    def forward(x: Any) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight

    norm.forward = forward


def positions_from_zero(model: Any) -> None:
    model.model.rotary_emb.register_forward_pre_hook(
        lambda m, args: (args[0], torch.arange(args[0].shape[1], device=args[0].device)[None])
    )


def shift_positions(model: Any) -> None:
    model.model.rotary_emb.register_forward_pre_hook(lambda m, args: (args[0], args[1] + 1))


def swap_types(model: Any) -> None:
    model.model.spec = replace(model.model.spec, layer_types=model.model.spec.layer_types[::-1])


def stop_key_gradient(attend: Any) -> None:
    compute = attend.compute_qkv
    attend.compute_qkv = lambda x: (lambda q, k, v: (q, k.detach(), v))(*compute(x))


def scale_spec(**fields: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.model, "spec", replace(model.model.spec, **fields))


def stale_rope(model: Any) -> None:
    rotary = model.model.rotary_emb
    rotary.rope_type = "linear"  # so that transformers' update leaves the frequencies as they are


def ignore_labels(model: Any) -> None:
    forward = model.forward
    model.forward = lambda *args, labels=None, **kwargs: forward(
        *args, labels=labels.clamp(min=0) if labels is not None else None, **kwargs
    )


def ignore_count(model: Any) -> None:
    forward = model.forward
    model.forward = lambda *args, num_items_in_batch=None, **kwargs: forward(*args, **kwargs)


def half_in_training(mlp: Any) -> None:
    mlp.register_forward_hook(lambda m, args, out: out * 0.5 if m.training else out)


def late_logits(model: Any) -> None:
    forward = model.forward
    model.forward = lambda *args, logits_to_keep=0, **kwargs: forward(
        *args, logits_to_keep=logits_to_keep + (logits_to_keep > 1), **kwargs
    )


def detach_under_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    original = attention.ALL_ATTENTION_FUNCTIONS.get_interface

    def get(name: str, default: Any) -> Any:
        attend = original(name, default)
        return (lambda m, q, k, *rest, **kw: attend(m, q, k.detach(), *rest, **kw)) if name == "sdpa" else attend

    monkeypatch.setattr(
        attention, "ALL_ATTENTION_FUNCTIONS", type("Functions", (), {"get_interface": staticmethod(get)})
    )


def low_frequencies(model: Any) -> None:
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.to(model.dtype).float()


def lose_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = state_dict_adapter.CombinedProjectionStateDictAdapter
    original = adapter.to_hf

    def lossy(self: Any, *args: Any, **kwargs: Any) -> Any:
        return {key: value for key, value in original(self, *args, **kwargs).items() if "layers.1.mlp.down" not in key}

    monkeypatch.setattr(adapter, "to_hf", lossy)


SWAPPED_PARTS = Fusion(fused="gate_up_proj", parts=("up_proj", "gate_proj"), blocks=(1, 1))
MODULES = "layer by layer"

MUTATIONS = {
    # RoPE
    "interleaved RoPE": Mutation(
        MODULES,
        "rope: interleaved instead of half-split",
        patch=set_attribute(attention, "apply_rotary_pos_emb", interleaved),
    ),
    "RoPE turned back": Mutation(
        MODULES,
        "rope: turned the other way instead of half-split",
        patch=set_attribute(attention, "apply_rotary_pos_emb", turned_back),
    ),
    "RoPE on queries only": Mutation(
        MODULES,
        "rope: on queries only",
        patch=set_attribute(attention, "apply_rotary_pos_emb", lambda q, k, c, s, **_: (half_split(q, c, s), k)),
    ),
    "no RoPE": Mutation(
        MODULES,
        "rope: on no head",
        patch=set_attribute(attention, "apply_rotary_pos_emb", lambda q, k, c, s, **_: (q, k)),
    ),
    "wrong theta": Mutation(MODULES, "rope_theta", lambda m: m.model.rotary_emb.inv_freq.mul_(0.9)),
    "wrong attention factor": Mutation(
        MODULES, "the attention factor", lambda m: setattr(m.model.rotary_emb, "attention_scaling", 1.1)
    ),
    "scaled RoPE not applied": Mutation(
        MODULES,
        "the RoPE scaling",
        lambda m: m.model.rotary_emb.inv_freq.copy_(500.0 ** -(torch.arange(0, 16, 2) / 16)),
        config={"rope_parameters": LLAMA3, "max_position_embeddings": 16384},
    ),
    "RoPE that does not grow": Mutation(
        "long inputs",
        "72 tokens",
        stale_rope,
        config={"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}},
    ),
    # attention
    "wrong scaling": Mutation(
        MODULES, "scale: 0.0625 instead of 0.25", on_layers("self_attn", lambda a: setattr(a, "scaling", 1 / 16))
    ),
    "keys and values swapped": Mutation(
        MODULES,
        "values: the keys' instead of its own",
        patch=set_attribute(
            combined_qkv.CombinedQKVAttentionMixin,
            "compute_qkv",
            lambda self, x: (lambda q, k, v: (q, v, k))(*self.qkv_layout.split(self.qkv_proj(x), dim=-1)),
        ),
    ),
    "mask one off": Mutation(MODULES, "mask: causal and one token more", patch=mask_with(lambda i, j: j <= i + 1)),
    "token does not see itself": Mutation(
        MODULES, "mask: causal without the token itself", patch=mask_with(lambda i, j: (j < i) | (i + j == 0))
    ),
    "no mask": Mutation(MODULES, "mask: none instead of causal", patch=mask_with(lambda i, j: (i >= 0) & (j >= 0))),
    "key heads in strides": Mutation(
        MODULES,
        "groups: strides instead of neighbours",
        patch=set_attribute(attention, "eager_attention_forward", tiled_heads),
    ),
    "wrong layer slides": Mutation(
        MODULES, "mask: window of 6 instead of causal", swap_types, family="qwen2", config=SLIDING
    ),
    "window one off": Mutation(
        MODULES,
        "mask: window of 7 instead of window of 6",
        lambda m: setattr(m.config, "sliding_window", 7),
        family="qwen2",
        config=SLIDING,
    ),
    "query and key norms forgotten": Mutation(
        MODULES, "norm: none instead of before RoPE", model_class=Qwen3LikeLlama, family="qwen3"
    ),
    # projections
    "bias missing": Mutation(
        MODULES, "its bias is missing", on_layers("self_attn.qkv_proj", drop_bias), family="qwen2"
    ),
    "bias too many": Mutation(
        MODULES, "it has a bias that the reference has not", on_layers("self_attn.o_proj", add_bias)
    ),
    "query heads reversed": Mutation(MODULES, "head order mixed", on_layers("self_attn.qkv_proj", reverse_query_heads)),
    "rows of the other RoPE": Mutation(
        MODULES, "in another order inside each head", on_layers("self_attn.qkv_proj", interleave_query_rows)
    ),
    "gate and up swapped": Mutation(
        MODULES, "gate and up: swapped", patch=set_attribute(state_dict_adapter, "GATE_UP", SWAPPED_PARTS)
    ),
    "wrong activation": Mutation(
        MODULES, "activation: gelu instead of silu", on_layers("mlp", lambda m: setattr(m, "act_fn", nn.GELU()))
    ),
    # norms and scalars
    "norm offset forgotten": Mutation(
        MODULES, "gain: the weight instead of 1 + the weight", family="gemma", model_class=GemmaLikeLlama
    ),
    "norm offset too many": Mutation(
        MODULES, "gain: 1 + the weight instead of the weight", on_layers("input_layernorm", with_offset)
    ),
    "wrong eps": Mutation(
        MODULES, "eps: 1e-05 instead of 1e-06", on_layers("input_layernorm", lambda n: setattr(n, "eps", 1e-5))
    ),
    "norm that centres": Mutation(MODULES, "mean: subtracted instead of kept", on_layers("input_layernorm", centred)),
    "embeddings scaled": Mutation(MODULES, "counts 2 times", scale_spec(embedding_multiplier=2.0)),
    "residual scaled": Mutation(
        MODULES,
        "self_attn counts 0.5 times",
        lambda m: [setattr(x, "residual_multiplier", 0.5) for x in m.model.layers] and None,
    ),
    "logits scaled": Mutation(MODULES, "the logits are 0.125 times", scale_spec(logits_multiplier=0.125)),
    # storage
    "tied head untied": Mutation("tied storage", "two parameters here", untie, config={"tie_word_embeddings": True}),
    "head tied": Mutation(MODULES, "the head is tied to the embedding", tie),
    "layer filled with another's": Mutation(
        "every key used once",
        "model.layers.0.",
        lambda m: m.model.layers[0].mlp.load_state_dict(m.model.layers[1].mlp.state_dict()) and None,
    ),
    "key lost on the way out": Mutation("round trip", "layers.1.mlp.down_proj", patch=lose_a_key),
    "field unread": Mutation(
        "config fields read",
        "config.attention_bias=True",
        config={"attention_bias": True},
        model_class=LlamaWithoutBias,
        family="llama",
    ),
    "config changed": Mutation("config kept", "config.rms_norm_eps", lambda m: setattr(m.config, "rms_norm_eps", 0.5)),
    # training
    "labels of -100 counted": Mutation("labels and masks", "labels of -100: ", ignore_labels),
    "count of items ignored": Mutation("labels and masks", "num_items_in_batch: ", ignore_count),
    "row of the padding token learns": Mutation(
        "labels and masks",
        "padding tokens without a mask: grad model.embed_tokens",
        lambda m: setattr(m.model.embed_tokens, "padding_idx", None),
        config={"pad_token_id": 3},
    ),
    "another MLP in training": Mutation("training mode", "differs by", on_layers("mlp", half_in_training)),
    "dropout never applied": Mutation(
        "training mode",
        "config.attention_dropout=0.5 acts on the reference, and not here",
        on_layers("self_attn", lambda a: setattr(a, "attention_dropout", 0.0)),
    ),
    "gradient lost under sdpa": Mutation("attention backends", "k_proj", patch=detach_under_sdpa),
    "one logit too many": Mutation("inputs and outputs", "logits_to_keep=3", late_logits),
    "frequencies rounded": Mutation("real RoPE", "rounded before they should be", low_frequencies),
    # the rest
    "padding ignored": Mutation("padding", "attention mask is not honoured", patch=mask_without("attention_mask")),
    "packed documents leak": Mutation("packed documents", "see each other", patch=mask_without("position_ids")),
    "decoding from position zero": Mutation("cached decoding", "token by token differs", positions_from_zero),
    "gradient lost": Mutation("gradients in float64", "k_proj", on_layers("self_attn", stop_key_gradient)),
    "norm in low precision": Mutation(
        "rounding by module", "input_layernorm", on_layers("input_layernorm", in_low_precision)
    ),
    "no checkpointing": Mutation(
        "gradient checkpointing", "changes nothing", lambda m: setattr(m, "gradient_checkpointing_enable", lambda: None)
    ),
}


def target_of(mutation: Mutation) -> Target:
    if mutation.family in CONFIGS:
        config = CONFIGS[mutation.family](**mutation.config)
        base = mutation.model_class or registry.resolve(f"{mutation.family.capitalize()}ForCausalLM")
    else:
        config, base = mutation.model_class.config_class(**LLAMA), mutation.model_class

    class Mutant(base):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            model = super().from_pretrained(*args, **kwargs)
            with torch.no_grad():
                mutation.change(model)
            return model

    return Target.of(
        Mutant, config, reference=f"transformers.{type(config).__name__.removesuffix('Config')}ForCausalLM"
    )


def check(target: Target, name: str) -> Any:
    run = next(check.run for check in all_checks(target) if check.name == name)
    with Subject(target) as subject:
        return run(subject)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught_and_named(name, monkeypatch):
    mutation = MUTATIONS[name]
    target = target_of(mutation)
    mutation.patch(monkeypatch)
    outcome = check(target, mutation.caught_by)
    assert outcome.passed is False, outcome
    assert mutation.says in outcome.detail, outcome.detail


RIGHT = {(m.family, tuple(sorted(m.config))): m for m in MUTATIONS.values() if m.model_class is None}


@pytest.mark.parametrize("key", RIGHT)
@pytest.mark.parametrize("name", sorted({m.caught_by for m in MUTATIONS.values()}))
def test_nothing_is_caught_in_what_is_right(key, name):
    right = replace(RIGHT[key], change=lambda model: None, patch=lambda monkeypatch: None)
    assert check(target_of(right), name).passed


def test_what_cancels_is_no_mistake():
    shifted = Mutation("layer by layer", "", shift_positions)  # RoPE is relative: scores do not change
    outcome = check(target_of(shifted), "layer by layer")
    assert outcome.passed
    assert "arranged in another way, to the same effect: model.rotary_emb" in outcome.detail
