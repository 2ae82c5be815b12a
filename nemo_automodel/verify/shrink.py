"""A tiny config with the features of a big one, so that every check takes seconds."""

import copy
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 97
HEAD_DIM = 16
MAX_LAYERS = 8
LENGTH = 24
"""Tokens of the sample that most checks run; shrunk windows are shorter, shrunk original context lengths longer."""

_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")
_NOT_KEPT = ("model_type", "transformers_version", "quantization_config")  # random weights are not quantized
_ORIGINAL_CONTEXT = LENGTH + 8
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


def shrunk(config: PreTrainedConfig, *, keep_rope: bool = False) -> tuple[PreTrainedConfig, list[str]]:
    """A copy of ``config`` with small sizes; and what was changed, ``"field: old -> new"``.

    Kept are all flags, and the relations between sizes that select code: grouped heads, a head_dim that is not
    hidden_size / heads, a layer of every kind, windows (shorter than the sample), scaled RoPE (its original length is
    longer than the sample), tied or untied embeddings.

    Args:
        config: of any size; it is left alone.
        keep_rope: keep head_dim, context lengths and RoPE as they are, so that its frequencies are the real ones.
    """
    before = config.to_dict()
    layers = _layers(config)
    sizes = _sizes(config, keep_rope) | {"num_hidden_layers": len(layers)}
    tiny = copy.deepcopy(config)
    for name, value in sizes.items():
        setattr(tiny, name, value)
    for name, values in _by_layer(config).items():
        setattr(tiny, name, type(values)(values[layer] for layer in layers))
    for name in _SPECIAL_TOKENS:
        setattr(tiny, name, _small_token(getattr(config, name, None)))
    if (rope := getattr(config, "rope_parameters", None)) is not None and not keep_rope:
        tiny.rope_parameters = _small_rope(copy.deepcopy(rope), tiny)
    # what the class derives from its fields (and checks between them) is derived again
    fields = {name: value for name, value in tiny.to_dict().items() if name not in _NOT_KEPT}
    tiny = type(config)(**fields)
    after = tiny.to_dict()
    names = [name for name in before if before[name] != after.get(name) and name != "transformers_version"]
    return tiny, [f"{name}: {_short(before[name])} -> {_short(after.get(name))}" for name in names]


def _short(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, list | tuple) and len(value) > 3 else str(value)


def _sizes(config: PreTrainedConfig, keep_rope: bool) -> dict[str, Any]:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    # four groups of heads at most, so that meshes of two and four can be tried; groups of three show what two hide
    kv, group = min(kv_heads, 2 if kv_heads < heads else 4), min(heads // kv_heads, 3)
    if keep_rope:  # real heads are wide: as few as show the same
        kv, group = 1, min(group, 2)
    tiny_heads = kv * group
    own = getattr(config, "head_dim", None)
    head_dim = (own or config.hidden_size // heads) if keep_rope else HEAD_DIM
    apart = own is not None and own * heads != config.hidden_size
    hidden = tiny_heads * (HEAD_DIM // 2 * 3 if apart else head_dim)
    sizes: dict[str, Any] = {"num_attention_heads": tiny_heads, "hidden_size": hidden, "vocab_size": VOCABULARY}
    if getattr(config, "num_key_value_heads", None) is not None:
        sizes["num_key_value_heads"] = kv
    if own is not None:
        sizes["head_dim"] = head_dim
    for name, extra in (("intermediate_size", 4), ("shared_intermediate_size", 12)):  # which of them is read shows
        if isinstance(getattr(config, name, None), int):
            sizes[name] = 2 * hidden + extra
    if getattr(config, "mamba_n_heads", None):  # of hybrids, whose configs check them where no layer has any, too
        sizes |= {"mamba_n_heads": 1, "mamba_d_head": config.mamba_expand * hidden}
    if getattr(config, "sliding_window", None):
        sizes["sliding_window"] = min(config.sliding_window, 6)
    if getattr(config, "max_window_layers", None) is not None:
        sizes["max_window_layers"] = min(config.max_window_layers, 1)
    if not keep_rope:
        sizes["max_position_embeddings"] = min(config.max_position_embeddings, 2 * LENGTH)
        if getattr(config, "original_max_position_embeddings", None):  # which Phi-3 writes over that of its RoPE
            sizes["original_max_position_embeddings"] = _ORIGINAL_CONTEXT
    return sizes


def _by_layer(config: PreTrainedConfig) -> dict[str, Any]:
    """The config's lists with an entry for each layer."""
    number = config.num_hidden_layers
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == number and name != "architectures"
    }


def _layers(config: PreTrainedConfig) -> list[int]:
    """The first two layers, and the first of every kind that a per-layer list has."""
    number = config.num_hidden_layers
    kept = set(range(min(2, number)))
    for values in _by_layer(config).values():
        kinds = [str(value) for value in values]
        kept |= {kinds.index(kind) for kind in dict.fromkeys(kinds)}
    return sorted(kept)[:MAX_LAYERS]


def _small_token(value: Any) -> Any:
    if isinstance(value, list):
        return [_small_token(item) for item in value]
    return value % 3 if isinstance(value, int) and value >= VOCABULARY else value


def _small_rope(rope: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    for nested in rope.values():
        if isinstance(nested, dict):
            _small_rope(nested, config)
    if rope.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = _ORIGINAL_CONTEXT
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turning = int(head_dim * rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0) or 1.0))
    for name in ("short_factor", "long_factor"):
        if name in rope:  # evenly spread over the frequencies, so that both ends stay
            factors = rope[name]
            count = turning // 2
            rope[name] = [factors[i * (len(factors) - 1) // max(1, count - 1)] for i in range(count)]
    return rope
