"""A family's files, from the texts in ``templates/``: in the repository's style, formatted as ruff would."""

import json
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.onboard.config_fields import ALTERNATIVES
from nemo_automodel.onboard.describe import Family
from nemo_automodel.onboard.families import row
from nemo_automodel.onboard.observe import FIXED, UNSEEN
from nemo_automodel.onboard.words import differences, sentence, todo

LINE = 120
_MODELS = "nemo_automodel.components.models"
_ADAPTER = f"{_MODELS}.common.combined_projection.state_dict_adapter"

_PLAIN = {
    field.name: {"norms": "NormSlots()", "mlp": "CombinedGateUpMLP"}.get(field.name, repr(field.default))
    for field in fields(DecoderSpec)
}
"""Slot -> the code that need not be written."""

_NEEDED = {"layer_types": '("full_attention",) * config.num_hidden_layers', "norm_eps": "config.rms_norm_eps"}
"""What stands in for a slot without a default where no code was found; the report lists it."""

_BEFORE = {
    "tuple(config.layer_types)": "assert config.layer_types is not None  # the config fills it in",
    "(kind,) * config.num_hidden_layers": (
        'kind = "full_attention" if config.sliding_window is None else "sliding_attention"'
    ),
}
"""A slot's code -> the statement that it needs before it."""

_FIRST = ("norm_eps", "layer_types", "sliding_window")


def in_repository(family: Family, like: Family, name: str) -> dict[Path, str]:
    """The files of a family that are its own, by their path in the repository."""
    folder, values = Path(_MODELS.replace(".", "/")) / name, _values(family, like, name)
    module = f"{_MODELS}.{name}"
    adapter = f"{family.prefix}StateDictAdapter"
    heads = _heads(family)
    init = f"{imported(f'{module}.model', heads)}\n\n__all__ = [{', '.join(map(_literal, heads))}]\n"
    adapter_file = (
        f'"""{_stored(family)}"""\n\n{imported(_ADAPTER, [_ADAPTER_CLASS], wrap=True)}\n\n\n{_adapter(values)}'
    )
    first_party = [*_imports(family), imported(f"{module}.state_dict_adapter", [adapter])]
    imports = [imported("transformers", [values["config"]]), "", *sorted(first_party)]
    return {
        folder / "__init__.py": init,
        folder / "model.py": _fill("model.py", values, imports="\n".join(imports), register=""),
        folder / "state_dict_adapter.py": adapter_file,
        **{folder / file: text for file, text in _rope_utils(family).items()},
        Path("tests/components/models") / f"test_{name}.py": _test(family, values),
        Path("examples") / f"{name}.yaml": _fill("recipe.yaml", values),
    }


def stand_alone(family: Family, like: Family, name: str, config: str) -> dict[Path, str]:
    """The files of a folder that needs the installed library only; ``config`` is the text of its ``config.json``."""
    values = _values(family, like, name)
    left = [f"- {line}" for line in todo(family)]
    registry = imported("nemo_automodel._transformers", ["registry"])
    adapter = imported(_ADAPTER, [_ADAPTER_CLASS], wrap=True)
    registered = [f'registry.register("{head}", {head}, exist_ok=True)' for head in _heads(family)]
    first_party = [*_imports(family), adapter]
    if left:  # an implementation that is wrong must not take the place of transformers' class
        registered = ["# once it verifies:", *(f"# {line}" for line in (registry, *registered))]
    else:
        first_party.append(registry)
    imports = [*sorted(first_party), imported("transformers", [values["config"]])]
    rows = [f"| {slot}: {other} | {code} |" for slot, code, other in differences(family, like)]
    return {
        Path("model.py"): _fill(
            "model.py",
            values,
            imports="\n".join(imports) + f"\n\n\n{_adapter(values)}".rstrip(),
            register="\n".join(registered),
        ),
        **{Path(file): text for file, text in _rope_utils(family).items()},
        Path("config.json"): config,
        Path("test_model.py"): _fill("standalone_test.py", values),
        Path("README.md"): _fill(
            "standalone_readme.md", values, rows="\n".join(rows) or "| nothing | |", todo="\n".join(left) or "nothing."
        ),
    }


def registry_entries(family: Family, name: str) -> str:
    """The lines of ``MODEL_ARCH_MAPPING``."""
    causal, *classifier = _heads(family)
    lines = [f'("{causal}", (f"{{_MODELS}}.{name}.model", "{causal}")),']
    for head in classifier:
        lines += ["(", f'    "{head}",', f'    (f"{{_MODELS}}.{name}.model", "{head}", {{"retrieval"}}),', "),"]
    return "".join(f"        {line}\n" for line in lines)


def docs_row(family: Family, like: Family, name: str) -> str:
    """The family's line of the table in ``docs/models.md``, until ``onboard.families`` writes it from the code."""
    return row(name, _heads(family), sentence(family, like), limits="; ".join(family.by_hand()) or "none known") + "\n"


_ADAPTER_CLASS = "CombinedProjectionStateDictAdapter"


def _values(family: Family, like: Family, name: str) -> dict[str, str]:
    """What the templates put in."""
    prefix, words = family.prefix, sentence(family, like)
    title = f'"""{prefix} on fused projections{": " if words else ""}{words}."""'
    if len(title) > LINE:
        title = f'"""{prefix} on fused projections.\n\n{textwrap.fill(f"{words[0].upper()}{words[1:]}.", LINE)}\n"""'
    return {
        "prefix": prefix,
        "name": name,
        "config": type(family.config).__name__,
        "title": title,
        "spec": "\n".join(f"        {line}" for line in _spec(family)),
        "by_hand": "".join(f"    # by hand: {line}\n" for item in todo(family) for line in textwrap.wrap(item, 104)),
        "classifier": _fill("classifier.py", {"prefix": prefix}) if family.classifies else "",
        "stored": _stored(family),
        "adapter_body": "" if _code(family)["mlp"] != "PlainMLP" else "\n    fuses_gate_up = False\n",
    }


def _heads(family: Family) -> list[str]:
    heads = ["CausalLM", *(["SequenceClassification"] if family.classifies else [])]
    return [f"{family.prefix}For{head}" for head in heads]


def _stored(family: Family) -> str:
    return f"{family.prefix}'s checkpoints hold the standard separate projections."


def _adapter(values: dict[str, str]) -> str:
    return _fill("adapter.py", values)


def _code(family: Family) -> dict[str, str]:
    """Slot -> code, what stands in for unknown ones included."""
    return {slot: code or _NEEDED.get(slot, _PLAIN[slot]) for slot, code in family.slots.items()}


def _spec(family: Family) -> Iterator[str]:
    """Lines of the body of ``decoder_spec``."""
    code = _code(family)
    order = [slot for slot in (*_FIRST, *_PLAIN) if slot in code]
    yield from (_BEFORE[code[slot]] for slot in dict.fromkeys(order) if code[slot] in _BEFORE)
    yield "return DecoderSpec("
    for slot in dict.fromkeys(order):
        if code[slot] != _PLAIN[slot]:
            yield from _argument(slot, code[slot])
    yield ")"


def _argument(slot: str, code: str) -> Iterator[str]:
    """``slot=code,``, over several lines where it is too long for one."""
    call, _, arguments = code.removesuffix(")").partition("(")
    if len(f"            {slot}={code},") <= LINE:
        yield f"    {slot}={code},"
    elif " else " in code:
        first, *others = re.split(" (?=if |else )", code)
        yield f"    {slot}={first}"
        yield from (f"    {other}{',' if other is others[-1] else ''}" for other in others)
    else:
        yield f"    {slot}={call}("
        yield from (f"        {argument}," for argument in arguments.split(", "))
        yield "    ),"


def _imports(family: Family) -> list[str]:
    code = "\n".join(_spec(family))
    heads = [f"Decoder{head.removeprefix(family.prefix)}" for head in _heads(family)]
    found = [
        imported(f"{_MODELS}.common.decoder", [*heads, "DecoderPreTrainedModel"]),
        imported(f"{_MODELS}.common.spec", ["DecoderSpec", *(["NormSlots"] if "NormSlots" in code else [])]),
    ]
    if "PlainMLP" in code:
        found.append(imported(f"{_MODELS}.common.combined_projection.combined_mlp", ["PlainMLP"]))
    return found


def imported(module: str, names: Iterable[str], *, wrap: bool = False) -> str:
    """An import as ruff lays it out."""
    names = list(names)
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= LINE and not wrap:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"


def _rope_utils(family: Family) -> dict[str, str]:
    """A file to start from, where RoPE differs from the common decoder's."""
    facts = {each.facts[name] for each in family.observations for name in FIXED if name.startswith("RoPE")}
    if facts <= {*FIXED.values(), UNSEEN}:
        return {}
    module = family.reference_class.__module__
    found = vars(sys.modules[module])
    names = sorted(name for name in found if name.endswith("RotaryEmbedding") or name == "apply_rotary_pos_emb")
    values = {"prefix": family.prefix, "imports": imported(module, names), "names": ", ".join(map(_literal, names))}
    return {"rope_utils.py": _fill("rope_utils.py", values)}


def _test(family: Family, values: dict[str, str]) -> str:
    config, default = family.config, type(family.config)()
    given = {
        name: getattr(config, name)
        for name in (*ALTERNATIVES, "tie_word_embeddings", "rope_parameters")
        if hasattr(config, name) and getattr(config, name) != getattr(default, name, None)
    }
    configs = {"as given": given, "changed": family.changes}
    transformers = [values["config"], *(_heads(family)[1:])]
    classifier = ""
    if family.classifies:
        classifier = _fill("test_classifier.py", values)
    return _fill(
        "test.py",
        values | {"classifier": classifier},
        transformers=", ".join(transformers),
        conftest="from tests.conftest import assert_near, tiny, tokens, twins\n" if family.classifies else "",
        configs="\n".join(line for name, each in configs.items() for line in _dictionary(name, each)),
        layers=str(family.observations[0].config.num_hidden_layers),
    )


def _dictionary(name: str, values: dict[str, Any]) -> Iterator[str]:
    if not values:
        yield f'    "{name}": {{}},'
        return
    yield f'    "{name}": {{'
    yield from (f"        {_literal(key)}: {_literal(value)}," for key, value in values.items())
    yield "    },"


def _literal(value: Any) -> str:
    """Python code, strings in double quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in sorted(value.items())) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _fill(template: str, values: dict[str, str], **more: str) -> str:
    text = (files("nemo_automodel.onboard") / "templates" / f"{template}.txt").read_text()
    filled = Template(text).substitute(values | more)
    return filled if template == "classifier.py" else filled.rstrip() + "\n"
