"""A family as a `DecoderSpec` in code: which expression of the config fills each slot, and what no slot covers.

The reference is observed with the config as given and with each field of `ALTERNATIVES` changed. An expression is taken
for a slot when it gives what was observed every time, so none is guessed from a field's name.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nemo_automodel.components.models.common.spec import LAYER_TYPES, NormSlots
from nemo_automodel.onboard.config_fields import ALTERNATIVES, NEEDED, NotDense, refuse_if_not_dense, unread
from nemo_automodel.onboard.observe import EPSILON, FIXED, SLOTS, UNSEEN, Facts, observe
from nemo_automodel.verify.shrink import shrunk

EVERY_LAYER = "full_attention"
FP32 = 1e-6
"""Relative error of a factor that the class keeps in fp32."""

Form = tuple[str, Callable[[PreTrainedConfig], Any]]
"""Code of an expression in ``config``, and what it gives."""


@dataclass(frozen=True)
class Observation:
    """The reference's behaviour under one config.

    Attributes:
        changes: fields and their values against the config as given, empty for that itself.
        config: a tiny one.
        facts: what `observe` saw.
    """

    changes: dict[str, Any]
    config: PreTrainedConfig
    facts: Facts

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.changes.items() if name != "layer_types")


@dataclass(frozen=True)
class Family:
    """What a config's architecture is.

    Attributes:
        config: as given.
        reference_class: transformers' causal-LM class.
        observations: as given first, then with one field changed each.
        untried: changes that the config or the class refuses.
        fields: of the config, its class's defaults included.
    """

    config: PreTrainedConfig
    reference_class: Any
    observations: tuple[Observation, ...]
    untried: tuple[str, ...]
    fields: dict[str, Any]

    @property
    def prefix(self) -> str:
        """``"Qwen3"`` of ``Qwen3ForCausalLM``."""
        return self.reference_class.__name__.removesuffix("ForCausalLM")

    @property
    def classifies(self) -> bool:
        """Whether transformers has a sequence-classification class beside the causal LM."""
        return hasattr(transformers, f"{self.prefix}ForSequenceClassification")

    @property
    def changes(self) -> dict[str, Any]:
        """All changes at once that change what the model computes, its sizes apart."""
        given, *others = self.observations
        changes = [each.changes for each in others if each.facts != given.facts and "hidden_size" not in each.changes]
        return {name: value for each in changes for name, value in each.items()}

    @cached_property
    def slots(self) -> dict[str, str | None]:
        """Slot of `DecoderSpec` -> its code; None where no expression fits all that was observed."""
        found = {name: self._expression(name) for name in SLOTS if name != "sliding_window"}
        if any("sliding_attention" in each.facts["layer_types"] for each in self.observations):
            found["sliding_window"] = "config.sliding_window"
        return found

    def _expression(self, slot: str) -> str | None:
        seen = [each for each in self.observations if each.facts[slot] != UNSEEN]
        for code, value in self._forms(slot) if seen else ():
            if all(_equal(slot, value(each.config), each.facts[slot]) for each in seen):
                return code
        return None

    def _forms(self, slot: str) -> Iterator[Form]:
        given = self.observations[0].facts[slot]
        if slot == "layer_types":
            yield from _layer_forms(self.config)
        elif isinstance(given, NormSlots | bool | float | None | str) and _is_value(slot, given):
            yield _code(given), lambda config: given
        for name in (*ALTERNATIVES, "hidden_size"):
            if hasattr(self.config, name):
                yield from _field_forms(slot, name, [(e.config, e.facts[slot]) for e in self.observations])

    def by_hand(self) -> list[str]:
        """What the common decoder does not do and this family does; fields that nobody here knows."""
        given, *others = self.observations
        lines = []
        for slot, code in self.slots.items():
            if code is None and (value := given.facts[slot]) != UNSEEN:
                lines.append(
                    f"{slot}: {value}" + " now, but by no expression of the config" * (not isinstance(value, str))
                )
        for name, plain in FIXED.items():
            if given.facts[name] not in (plain, UNSEEN):
                lines.append(f"{name}: {given.facts[name]}")
            elif other := next((each for each in others if each.facts[name] not in (plain, UNSEEN)), None):
                lines.append(f"{name}: {other.facts[name]} (with {other})")
        absent = [name for name in NEEDED if not hasattr(self.config, name)]
        lines += [f"{name}: not in the config, and read by the common decoder" for name in absent]
        source = inspect.getsource(inspect.getmodule(self.reference_class))  # type: ignore[arg-type]
        return [*lines, *unread(self.fields, source), *self.untried]


def describe(config: PreTrainedConfig, fields: dict[str, Any]) -> Family:
    """Find out what ``config``'s architecture computes.

    Args:
        config: of any size; what is built is tiny.
        fields: of the file that it was read from.

    Raises:
        NotDense: not a dense decoder-only language model, or one that transformers cannot build.
    """
    fields = {**config.to_dict(), **fields}
    refuse_if_not_dense(fields)
    reference_class = reference_of(config)
    try:
        tiny, _ = shrunk(config)
        given = Observation({}, tiny, observe(reference_class, tiny))
    except Exception as error:  # whatever transformers' class raises on this config
        raise NotDense(
            f"transformers' {reference_class.__name__} cannot be built small from this config, or is unlike a decoder "
            f"of Llama's kind ({type(error).__name__}: {error})"
        ) from error
    observations, untried = [given], []
    for changes in alternatives(tiny):
        try:
            other = changed(tiny, changes)
            facts = observe(reference_class, other, attention=given.facts["attention"] == FIXED["attention"])
        except Exception as error:
            shown = " ".join(str(error).split())
            untried.append(f"not tried, since the class refuses it: {', '.join(changes)} ({shown})")
            continue
        observations.append(Observation(changes, other, facts))
    return Family(config, reference_class, tuple(observations), tuple(untried), fields)


def reference_of(config: PreTrainedConfig) -> Any:
    """transformers' causal-LM class for ``config``.

    Raises:
        NotDense: there is none.
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if not isinstance(name, str) or not name.endswith("ForCausalLM"):
        raise NotDense(
            f"model_type={config.model_type!r}: transformers {transformers.__version__} has no ...ForCausalLM class "
            f"for it to read and to compare with ({name or 'is it remote code?'})"
        )
    return getattr(transformers, name)


def alternatives(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Changes of ``config``, one field each; windows, which several fields make up, together."""
    by_layer = getattr(config, "layer_types", None) is not None
    for name, other in ALTERNATIVES.items():
        if hasattr(config, name) and not (by_layer and name == "sliding_window"):
            yield {name: other(getattr(config, name))}
    if by_layer and hasattr(config, "sliding_window"):
        windows = {"sliding_window": 6} | (
            {"use_sliding_window": True} if hasattr(config, "use_sliding_window") else {}
        )
        kinds = [LAYER_TYPES[1 - i % 2] for i in range(config.num_hidden_layers)]
        yield windows | {"layer_types": [EVERY_LAYER] * config.num_hidden_layers}
        yield windows | {"layer_types": kinds}
    yield {"hidden_size": 2 * config.hidden_size}


def changed(config: PreTrainedConfig, changes: dict[str, Any]) -> PreTrainedConfig:
    """A copy with other values, on which the class derives (and checks) its fields again."""
    fields = copy.deepcopy(config).to_dict() | changes
    return type(config)(**{name: fields[name] for name in fields if name not in ("model_type", "transformers_version")})


def _layer_forms(config: PreTrainedConfig) -> Iterator[Form]:
    yield (
        '("full_attention",) * config.num_hidden_layers',
        lambda c: (EVERY_LAYER,) * c.num_hidden_layers,
    )
    if hasattr(config, "layer_types"):
        yield "tuple(config.layer_types)", lambda c: tuple(c.layer_types)
    if hasattr(config, "sliding_window"):
        yield (
            "(kind,) * config.num_hidden_layers",
            lambda c: (LAYER_TYPES[c.sliding_window is not None],) * c.num_hidden_layers,
        )


def _field_forms(slot: str, name: str, observed: list[tuple[PreTrainedConfig, Any]]) -> Iterator[Form]:
    """``config.name`` in the ways in which families use their fields."""
    field = f"config.{name}"

    def power(exponent: float) -> Callable[[PreTrainedConfig], Any]:
        def value(config: PreTrainedConfig) -> Any:
            base = getattr(config, name)
            return base**exponent if isinstance(base, int | float) and base else None

        return value

    yield field, lambda config: getattr(config, name)
    yield f"not {field}", lambda config: not getattr(config, name)
    for code, exponent in ((f"1 / {field}", -1.0), (f"{field}**0.5", 0.5), (f"{field}**-0.5", -0.5)):
        yield code, power(exponent)
    on, off = ([fact for config, fact in observed if getattr(config, name) is state] for state in (True, False))
    if on and off and _is_value(slot, on[0]) and _is_value(slot, off[0]):
        yield f"{_code(on[0])} if {field} else {_code(off[0])}", lambda c: on[0] if getattr(c, name) else off[0]


def _equal(slot: str, a: Any, b: Any) -> bool:
    if isinstance(a, float | int) and isinstance(b, float) and not isinstance(a, bool):
        return math.isclose(a, b, rel_tol=EPSILON if slot == "norm_eps" else FP32)
    return type(a) is type(b) and a == b


_VALUES: dict[str, tuple[Any, ...]] = {
    "layer_types": (),
    "qk_norm": (None, "head", "full"),
    "mlp": ("CombinedGateUpMLP", "PlainMLP"),
}


def _is_value(slot: str, value: Any) -> bool:
    """Whether the slot can hold what was observed."""
    return value in _VALUES[slot] if slot in _VALUES else not isinstance(value, str)


def _code(value: Any) -> str:
    if isinstance(value, NormSlots):
        plain = NormSlots()
        parts = [
            f"{name}={_code(getattr(value, name))}"
            for name in NormSlots.__dataclass_fields__
            if getattr(value, name) != getattr(plain, name)
        ]
        return f"NormSlots({', '.join(parts)})"
    if isinstance(value, str):
        return value if value.endswith("MLP") else f'"{value}"'
    return repr(value)
