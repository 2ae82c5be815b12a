"""What the fields of a ``config.json`` mean here: one table. A field that is not in it is named, never guessed.

Fields stand in one of four groups: those that the common decoder reads; those whose effect is found by changing them
(`ALTERNATIVES`); those that matter only away from one value; those without effect on the forward pass.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any


class NotDense(ValueError):
    """The architecture is none that this tool can write; the message names the field that shows it."""


REFUSED: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("encoder-decoder", r"is_encoder_decoder", bool),
    ("a vision-language or speech model", r"(vision|audio|text|speech|image|video)_(config|token_id)", bool),
    ("mixture-of-experts", r"n(um)?_(local_|routed_)?experts", lambda value: (value or 0) > 0),
    ("mixture-of-experts", r"moe_\w+|\w*_moe_\w+|num_experts_per_tok", bool),
)
"""Kind, the fields that show it, and their values that do."""

_STATE_SPACE = re.compile(
    r"(use_)?(mamba|ssm|lru|rwkv|mlstm|slstm)_?\w*|state_size|conv_(kernel|L_cache)|linear_conv_\w+"
)
_RECURRENT_LAYERS = ("mamba", "linear_attention", "recurrent", "conv", "ssm")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NEEDED = _names(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "attention_dropout max_position_embeddings tie_word_embeddings pad_token_id rope_parameters"
)
"""What the common decoder reads from every config."""

READ = (
    *NEEDED,
    *_names("head_dim hidden_act initializer_range num_labels layer_types rope_theta rope_scaling"),
    "original_max_position_embeddings",
)
"""Read by the common decoder, its heads and its `RotaryEmbedding`, under these names."""

ROPE = _names(
    "rope_type type rope_theta factor original_max_position_embeddings attention_factor beta_fast beta_slow truncate "
    "short_factor long_factor low_freq_factor high_freq_factor mscale mscale_all_dim partial_rotary_factor"
)
"""Keys of ``rope_parameters`` that transformers' own RoPE functions read, which `RotaryEmbedding` calls."""


def _flip(value: Any) -> Any:
    return not value


def _factor(value: Any) -> Any:
    if isinstance(value, int):
        return 2 * value + 1  # where the class asks for an int
    return 1.75 if value is None else 1.25 * value + 0.5


def _epsilon(value: Any) -> Any:
    return 0.01 if value == 0.001 else 0.001


def _switch(on: Any) -> Callable[[Any], Any]:
    return lambda value: on if value is None else None


ALTERNATIVES: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        _names(
            "attention_bias attention_out_bias mlp_bias use_bias use_qkv_bias qkv_bias o_bias bias use_qk_norm "
            "qk_layernorm use_post_norm use_parallel_residual parallel_attn"
        ),
        _flip,
    ),
    **dict.fromkeys(_names("rms_norm_eps layer_norm_eps norm_eps norm_epsilon layer_norm_epsilon"), _epsilon),
    **dict.fromkeys(
        _names(
            "embedding_multiplier residual_multiplier attention_multiplier logits_scaling logit_scale "
            "query_pre_attn_scalar"
        ),
        _factor,
    ),
    **dict.fromkeys(_names("attn_logit_softcapping final_logit_softcapping"), _switch(20.0)),
    "clip_qkv": _switch(0.5),
    "sliding_window": _switch(6),
}
"""Field -> another value of it. The reference is run with each, which shows what the field does."""

ONLY: Mapping[str, Any] = {
    **dict.fromkeys(_names("hidden_dropout residual_dropout resid_pdrop embd_pdrop embedding_dropout"), 0.0),
    "use_bidirectional_attention": False,
    "pretraining_tp": 1,
    "alibi": False,
    "add_cross_attention": False,
    "is_decoder": False,
}
"""Field -> the value (besides None) at which it does nothing in the common decoder, which does not read it."""

SHOWN = _names(
    "hidden_activation activation no_rope_layers layer_rope_theta partial_rotary_factor rotary_pct "
    "position_embedding_type num_kv_heads multi_query new_decoder_architecture num_ln_in_parallel_attn "
    "ffn_hidden_size shared_intermediate_size"
)
"""Not read by the common decoder; what they do shows in what the reference computes, tensors and all."""

NO_EFFECT = _names(
    "model_type architectures transformers_version torch_dtype dtype _name_or_path auto_map use_cache bos_token_id "
    "eos_token_id sep_token_id eod_token_id id2label label2id problem_type output_attentions output_hidden_states "
    "return_dict chunk_size_feed_forward is_encoder_decoder classifier_dropout attn_implementation "
    "_attn_implementation task_specific_params tokenizer_class unsloth_version unsloth_fixed sliding_window_pattern "
    "_sliding_window_pattern use_sliding_window max_window_layers no_rope_layer_interval"
)
"""Of no effect on the forward pass of a causal language model, or folded into another field by the config class."""


def refuse_if_not_dense(fields: Mapping[str, Any]) -> None:
    """Raise for mixture-of-experts, vision-language, state-space and encoder-decoder configs.

    Raises:
        NotDense: naming the field.
    """
    for kind, pattern, shows in REFUSED:
        for name, value in fields.items():
            if re.fullmatch(pattern, name) and shows(value):
                _refuse(kind, name, value)
    layers = [name for name in ("layer_types", "layers_block_type", "block_types") if fields.get(name)]
    for name in layers:
        if recurrent := [kind for kind in fields[name] if kind in _RECURRENT_LAYERS]:
            _refuse("a state-space or recurrent model", name, recurrent[0])
    for name, value in fields.items():  # a list of layers that are all attention overrules what the others hint at
        if not layers and _STATE_SPACE.fullmatch(name) and value:
            _refuse("a state-space or recurrent model", name, value)


def _refuse(kind: str, name: str, value: Any) -> None:
    shown = f"{name}={value!r}" if len(repr(value)) < 60 else name
    raise NotDense(f"this is {kind} ({shown}); `automodel new` writes dense decoder-only language models")


def unread(fields: Mapping[str, Any], source: str) -> list[str]:
    """Fields that nobody here knows, and known ones at a value that the common decoder does not honour.

    Args:
        fields: the config's.
        source: of transformers' modeling file, which is searched for the names.
    """
    known = {*READ, *SHOWN, *NO_EFFECT, *ALTERNATIVES, *ONLY}
    lines = []
    for name, value in fields.items():
        if name in ONLY and value not in (None, ONLY[name]):
            lines.append(f"{name} = {value!r}: the common decoder knows {ONLY[name]!r} only")
        elif name not in known:
            lines.append(f"{_unknown(name, value)}; transformers' modeling file {_mention(name, source)}")
    rope = fields.get("rope_parameters") or {}
    for each in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        for name, value in each.items():
            if name not in ROPE and not isinstance(value, dict):
                lines.append(_unknown(f"rope_parameters.{name}", value))
    return lines


def _unknown(name: str, value: Any) -> str:
    return f"{name} = {str(value)[:60]}: a field that is not known here"


def _mention(name: str, source: str) -> str:
    return "reads it" if re.search(rf"\bconfig\.{re.escape(name)}\b", source) else "does not read it"
