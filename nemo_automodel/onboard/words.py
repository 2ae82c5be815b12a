"""A family's differences from another one: as a table, in a sentence, and where the rest is to be written."""

from nemo_automodel.onboard.describe import Family

_SAID = {
    "layer_types": {
        "tuple(config.layer_types)": "sliding-window layers by `layer_types`",
        "(kind,) * config.num_hidden_layers": "a sliding window on every layer where `sliding_window` is set",
        '("full_attention",) * config.num_hidden_layers': "no sliding window",
    },
    "qkv_bias": {"True": "biases on query, key and value", "False": "no bias on query, key and value"},
    "o_bias": {"True": "a bias on the attention's output", "False": "no bias on the attention's output"},
    "qk_norm": {'"head"': "RMSNorm on every query and key head", '"full"': "RMSNorm on all queries and on all keys"},
    "mlp": {"PlainMLP": "a plain MLP"},
    "sliding_window": {"config.sliding_window": ""},
}
"""Slot -> code -> words."""

_SAID_WITH_CODE = {
    "norm_eps": "epsilon `{}`",
    "qkv_bias": "biases on query, key and value by `{}`",
    "o_bias": "a bias on the attention's output by `{}`",
    "attention_scale": "scores times `{}`",
    "norms": "norms {}",
    "embedding_multiplier": "embeddings times `{}`",
    "residual_multiplier": "branches times `{}`",
    "logits_multiplier": "logits times `{}`",
}

_PLACES = {
    "before_attention": "before attention",
    "after_attention": "after attention",
    "before_mlp": "before the MLP",
    "after_mlp": "after the MLP",
}

WHERE = {
    "tensors": "from_hf and to_hf of the state-dict adapter (docs/write-a-model.md)",
    "norm": "the slot norm (NormSpec), or a norm beside RMSNorm in common/norm.py",
    "MLP": "the slot mlp: a functools.partial of CombinedGateUpMLP or PlainMLP, or an MLP of your own",
    "MLP bias": "the slot mlp: a functools.partial of CombinedGateUpMLP or PlainMLP, or an MLP of your own",
    "attention": "an attention of your own (examples/hand_written_model.py)",
    "softcap of the scores": "the slot attention_softcap",
    "RoPE": "the slot rope (RopeSpec), or rows in another order; rope_utils.py holds the reference's functions",
    "RoPE channels": "the slot rope: RopeSpec(share=...); rope_utils.py holds the reference's class",
    "RoPE tables": "the common decoder follows config.rope_parameters; rope_utils.py holds the reference's class",
    "residual stream": "the slot parallel, or another one, read by DecoderLayer",
    "between embedding and first layer": "forward of a DecoderModel of your own",
    "between last layer and head": "forward of a DecoderModel of your own",
    "after the head": "the slot logits_softcap, or forward of the causal-LM class",
}
"""What no slot covers -> where to write it."""


def differences(family: Family, like: Family) -> list[tuple[str, str, str]]:
    """What differs, as (slot, this family's code, the other one's)."""
    pairs = [(slot, code, like.slots.get(slot) or "None") for slot, code in family.slots.items() if code is not None]
    return [(slot, code, other) for slot, code, other in pairs if code != other]


def sentence(family: Family, like: Family) -> str:
    """The differences in words, one after the other."""
    said = []
    for slot, code, _ in differences(family, like):
        if slot == "norms":
            norms = family.observations[0].facts["norms"]
            code = ", ".join(words for place, words in _PLACES.items() if getattr(norms, place) is not None)
        words = _SAID.get(slot, {}).get(code)
        said.append(
            _SAID_WITH_CODE.get(slot, slot + " {}").format(code.replace("config.", "")) if words is None else words
        )
    return "; ".join(dict.fromkeys(filter(None, said)))


def todo(family: Family) -> list[str]:
    """What is to be written by hand, each with its place."""
    lines = []
    for line in family.by_hand():
        place = WHERE.get(line.partition(": ")[0])
        lines.append(f"{line} -> {place}" if place else line)
    return lines


def account(family: Family, like: Family) -> str:
    """What differs, both codes, and what covers it, for the terminal."""
    covered = [
        f"  {slot:<22} {code}   ({like.prefix}: {other})" for slot, code, other in differences(family, like)
    ] or ["  nothing"]
    lines = [f"differs from {like.prefix}, covered by a slot of DecoderSpec", *covered]
    if by_hand := todo(family):
        lines += ["not covered", *(f"  {line}" for line in by_hand)]
    return "\n".join(lines)
