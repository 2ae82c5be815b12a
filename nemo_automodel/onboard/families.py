"""The table of families in ``docs/models.md``: ``python -m nemo_automodel.onboard.families [REPORT.json ...]``.

Which families there are says the registry, what each has beside the plainest decoder its `decoder_spec` and adapter,
and what was verified reports of ``automodel verify --json``. Known checkpoints and limits are written into the page by
hand, and kept.
"""

import argparse
import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_automodel._transformers import registry
from nemo_automodel.components.models.common.combined_projection.state_dict_adapter import (
    InterleavedRopeStateDictAdapter,
)
from nemo_automodel.components.models.common.spec import DecoderSpec, NormSlots

PAGE = Path("docs/models.md")
_MODELS = "nemo_automodel.components.models"
VERIFIED = "verified with transformers"
COLUMNS = ("family", "known checkpoints", "features", "limits", VERIFIED, "architectures")
BY_HAND = {"known checkpoints": "", "limits": "none known", VERIFIED: "not yet"}
"""Columns that nothing in the code says, and what stands in them at first."""

_WORDS: dict[str, str | Mapping[str, str]] = {
    "norm_eps": "",
    "sliding_window": "",
    "layer_types": {
        "tuple(config.layer_types)": "window or full attention by `layer_types`",
        "(kind,) * config.num_hidden_layers": "a window on every layer where `sliding_window` is set",
        "('full_attention',) * config.num_hidden_layers": "",
    },
    "biases": "biases in attention",
    "qkv_bias": "biases on query, key and value",
    "o_bias": "a bias on the attention's output",
    "norm.kind": {"'layer'": "layer norms"},
    "norm.bias": {"True": "norms with biases"},
    "norm.offset": {"1.0": "norms times 1 + the weight"},
    "norm.fp32": "",
    "norm.initial": "",
    "parallel": "attention and MLP side by side",
    "qk_norm": {
        "'per_head'": "a norm with weights of its own for every query and key head",
        "'head'": "a norm on every query and key head",
        "'full'": "a norm over all queries and over all keys",
    },
    "qk_norm_after_rope": "these norms after RoPE",
    "attention_scale": "scores scaled",
    "attention_softcap": "a softcap on the scores",
    "attention_dropout": {"0.0": "attention weights never dropped"},
    "rope.layers": "layers without RoPE",
    "rope.share": "RoPE on a part of each head",
    "rope.frequencies": "RoPE of frequencies of its own",
    "rope.fp32_tables": "RoPE in fp32",
    "rope.fp32_rotation": "RoPE in fp32",
    "rope.query_growth": "queries that grow with their positions",
    "mlp": {"PlainMLP": "an MLP without a gate", "CombinedGateUpMLP": ""},
    "mlp.bias": "biases in the MLP",
    "mlp.activation": "the MLP's activation",
    "mlp.intermediate_size": "the MLP's width",
    "embedding_padding": {"False": "a padding row that learns"},
    "embedding_multiplier": "embeddings scaled",
    "embedding_multiplier_rounded": "",
    "embedding_dropout": "dropout of embeddings",
    "residual_multiplier": "both branches scaled",
    "residual_dropout": "dropout of both branches",
    "logits_multiplier": "logits scaled",
    "logits_softcap": "a softcap on the logits",
}
"""Slot -> words, or words by what is in its code; the fields of the config that it is read from are added."""

_STORED = {"qkv_rows": "query, key and value stored as one tensor", "gate_up_rows": "gate and up stored as one tensor"}
_ARE_SIZES = {"num_hidden_layers", "hidden_size"}


def row(name: str, architectures: Sequence[str], features: str, **by_hand: str) -> str:
    """A family's line of the table; ``by_hand`` are `BY_HAND`'s cells, as far as there are any."""
    cells = {
        "family": f"[{name}](../{_MODELS.replace('.', '/')}/{name}/model.py)",
        "features": features,
        "architectures": ", ".join(f"`{architecture}`" for architecture in architectures),
    }
    cells |= BY_HAND | by_hand
    return f"| {' | '.join(cells[column] for column in COLUMNS)} |"


def written(page: str, reports: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page with its table made anew.

    Args:
        page: as it is; known checkpoints, limits, and the versions that no report is of, are kept.
        reports: of ``automodel verify --json``, those of all configs of a family together.

    Raises:
        ValueError: the page has no such table.
    """
    before, head, after = page.partition(f"| {' | '.join(COLUMNS)} |\n")
    if not head:
        raise ValueError(f"{PAGE} has no table with the columns {', '.join(COLUMNS)}")
    rule, *lines = after.split("\n")
    old = [line for line in lines if line.startswith("| [")]
    cells = {line[3:].partition("]")[0]: dict(zip(COLUMNS, line[2:-2].split(" | "), strict=True)) for line in old}
    counts, new = _counts(reports), []
    for name, architectures in families().items():
        kept = {column: cell for column, cell in cells.get(name, {}).items() if column in BY_HAND}
        verified = dict(part.split(": ") for part in kept.get(VERIFIED, "").split("; ") if ": " in part)
        if verified := verified | counts.get(name, {}):
            kept[VERIFIED] = "; ".join(f"{version}: {verified[version]}" for version in sorted(verified))
        new.append(row(name, architectures, features(registry.resolve(architectures[0])), **kept))
    return before + head + "\n".join([rule, *new, *(line for line in lines if line not in old)])


def families() -> dict[str, list[str]]:
    """Family -> its architectures, in the registry's order."""
    found: dict[str, list[str]] = {}
    for architecture, (module, *_) in registry.MODEL_ARCH_MAPPING.items():
        if module.startswith(f"{_MODELS}."):
            found.setdefault(module.split(".")[-2], []).append(architecture)
    return found


def _counts(reports: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Family -> version of transformers -> how many checks passed, failed, and had nothing to look at."""
    outcomes: dict[tuple[str, str], list[bool | None]] = {}
    for report in reports:
        key = report["implementation"].split(".")[-3], report["versions"]["transformers"]
        outcomes.setdefault(key, []).extend(result["outcome"]["passed"] for result in report["results"])
    found: dict[str, dict[str, str]] = {}
    for (family, version), passed in outcomes.items():
        words = {True: "passed", False: "failed", None: "n/a"}
        said = [f"{passed.count(outcome)} {word}" for outcome, word in words.items() if outcome in passed]
        found.setdefault(family, {})[version] = ", ".join(said)
    return found


def features(model_class: Any) -> str:
    """What the family states, in words.

    Raises:
        ValueError: a slot, or code in one, that has no words here.
    """
    slots, adapter = stated(model_class), model_class.adapter_class
    shown = {path: code for path, code in slots.items() if not path.startswith("norms")}
    if "sliding_window" not in shown:
        del shown["layer_types"]
    if shown.get("qkv_bias") == shown.get("o_bias") is not None:
        shown["biases"] = shown.pop("qkv_bias")
        del shown["o_bias"]
    said = [_in_words(path, code) for path, code in shown.items()]
    said.append(_places(model_class, slots))
    said.append("RoPE of neighbouring channels" if issubclass(adapter, InterleavedRopeStateDictAdapter) else "")
    said += [words for method, words in _STORED.items() if method in vars(adapter)]
    return "; ".join(dict.fromkeys(filter(None, said))) or "nothing"


def _in_words(path: str, code: str) -> str:
    words = _WORDS.get(path)
    if isinstance(words, Mapping):
        words = next((said for part, said in words.items() if part in code), None)
    if words is None:
        raise ValueError(f"{path}={code}: say in {__name__} what that is in words")
    fields = re.findall(r"config\.(\w+)|rope_field\(config, '(\w+)'", code)
    names = (name for pair in fields for name in pair if name and name not in _ARE_SIZES and f"`{name}`" not in words)
    shown = ", ".join(f"`{name}`" for name in dict.fromkeys(names))
    return f"{words} ({shown})" if words and shown else words


def _places(model_class: Any, slots: Mapping[str, str]) -> str:
    """Where the norms are, if not before attention and MLP."""
    own = {path.partition(".")[2]: ast.literal_eval(code) for path, code in slots.items() if path.startswith("norms.")}
    norms = getattr(inspect.getmodule(model_class), slots["norms"]) if "norms" in slots else NormSlots(**own)
    if norms.before_mlp == norms.before_attention is not None:
        return "one norm for both"
    if norms.after_attention is None:
        return ""
    return "norms before and after both" if norms.before_attention else "norms after attention and MLP, not before"


def stated(model_class: Any) -> dict[str, str]:
    """Paths of the slots that the family's `decoder_spec` fills (``"norm.offset"``, ``"mlp.bias"``) -> their code."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(model_class.decoder_spec)))
    nodes = list(ast.walk(tree))
    local = {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in nodes if isinstance(node, ast.Assign)}
    calls = (node for node in nodes if isinstance(node, ast.Call))
    filled = _filled(next(call for call in calls if ast.unparse(call.func) == DecoderSpec.__name__))
    return {path: local.get(code, code) for path, code in filled}


def _filled(call: ast.Call, prefix: str = "") -> Iterator[tuple[str, str]]:
    for keyword in call.keywords:
        path, value = f"{prefix}{keyword.arg}", keyword.value
        if isinstance(value, ast.Call) and value.keywords:
            if path == "mlp":  # a functools.partial
                yield path, ast.unparse(value.args[0])
            yield from _filled(value, f"{path}.")
        else:
            yield path, ast.unparse(value)


def main() -> None:
    """Write the page, with what ``automodel verify --json`` reported where reports are given."""
    parser = argparse.ArgumentParser(prog="python -m nemo_automodel.onboard.families", description=main.__doc__)
    parser.add_argument("reports", nargs="*", type=Path, metavar="REPORT.json")
    reports = [json.loads(file.read_text()) for file in parser.parse_args().reports]
    PAGE.write_text(written(PAGE.read_text(), reports))


if __name__ == "__main__":
    main()
