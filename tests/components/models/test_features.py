"""Every feature that a family states is needed: switched off, the family no longer equals transformers' class.

What a family states are the slots of its `DecoderSpec` (those of its norms and RoPE and the arguments of its MLP
included), and what its model and its adapter set themselves. Each is put back to the common decoder's default, under
the configs of the family's own test, until a check fails. Where none does, the feature could be wrong and nobody would
notice, or no config makes use of it: give `CONFIGS` one that does.
"""

import copy
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from nemo_automodel.components.models.common.combined_projection.combined_mlp import CombinedGateUpMLP
from nemo_automodel.onboard.families import stated
from nemo_automodel.verify.checks import all_checks
from nemo_automodel.verify.checks.modules import MARGIN_IN_BF16
from nemo_automodel.verify.exact import Exact
from nemo_automodel.verify.outcome import Difference, NotApplicable, Outcome, bitwise, judge
from nemo_automodel.verify.subject import Subject
from nemo_automodel.verify.target import Target, find_target
from nemo_automodel.verify.trace import calls_of

BY_DEFAULT = ("cohere2", "granite", "nemotron")
"""The default suite looks at these, which take two seconds each; the longer suites at all."""

EVERY_FAMILY_SETS = {"config_class", "adapter_class", "decoder_spec", "_tied_weights_keys", "_tp_plan", "_pp_plan"}
OF_OTHER_FILES = {"_keys_to_ignore_on_load_unexpected"}
"""What shows in files only that today's transformers does not write: the family's own test has one."""

REQUIRED: dict[str, Callable[[Any], Any]] = {
    "norm_eps": lambda eps: 1e-5 if eps != 1e-5 else 1e-6,
    "layer_types": lambda kinds: ("full_attention",) * len(kinds),
}
"""Slots without a default -> what they are switched to."""


def families() -> Iterator[Any]:
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        if "\nCONFIGS: " in file.read_text():
            name = file.stem.removeprefix("test_")
            yield pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow)


@pytest.mark.parametrize("name", families())
def test_switched_off_it_is_caught(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = import_module(f"tests.components.models.test_{name}")
    noticed: dict[str, str] = {}
    with ExitStack() as stack:
        for target in targets(module, monkeypatch, tmp_path):
            subject, model_class = stack.enter_context(Subject(target)), target.model_class
            assert caught(subject, type(model_class.__name__, (model_class,), {}), FAST) == ""
            for feature in (*switched_on(model_class.decoder_spec(target.tiny)), *of_classes(model_class)):
                noticed[feature] = noticed.get(feature) or caught(subject, without(model_class, feature))
            # by fields that this config leaves alone, and a check may set
            for feature in stated(model_class).keys() - {*REQUIRED, "mlp"}:
                noticed[feature] = noticed.get(feature) or caught(subject, without(model_class, feature), FAST)
    assert [feature for feature, how in noticed.items() if not how] == []


def targets(module: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Target]:
    """What the family's own test verifies, a target for each of its configs."""
    found: list[Target] = []
    monkeypatch.setattr(module, "assert_verified", lambda name, config: found.append(find_target(name, config)))
    for number, name in enumerate(module.CONFIGS):
        module.test_equals_transformers(name, folder / str(number))
    return found


# what there is to switch off


def switched_on(spec: Any, prefix: str = "") -> Iterator[str]:
    """Paths of the slots that are not as the common decoder has them: ``"norm.offset"``, ``"mlp.bias"``, ..."""
    for slot in fields(spec):
        path, value = f"{prefix}{slot.name}", getattr(spec, slot.name)
        if path == "mlp":
            if getattr(value, "func", value) is not CombinedGateUpMLP:
                yield path
            yield from (f"mlp.{argument}" for argument in getattr(value, "keywords", ()))
        elif is_dataclass(value):
            yield from switched_on(value, f"{path}.")
        elif path == "rope.layers" and value is not None and all(value):
            continue  # which says what the default says
        elif value != default_of(spec, slot.name):
            yield path


def of_classes(model_class: Any) -> Iterator[str]:
    """What the family's model and adapter set beside what every family does: ``"model.name"``, ``"adapter.name"``."""
    adapter, package = model_class.adapter_class, model_class.__module__.removesuffix("model")
    left_out = EVERY_FAMILY_SETS | OF_OTHER_FILES
    if any(own.endswith("up_proj") for own, _ in adapter.renames):  # then nothing is taken for a part of gate_up_proj
        left_out = left_out | {"fuses_gate_up"}
    for title, family in (("model", model_class), ("adapter", adapter)):
        for owner in family.__mro__:
            if owner.__module__.startswith(package):
                own = (name for name in vars(owner) if name not in left_out and not name.startswith("__"))
                own = (name for name in own if not name.endswith("_cached_value"))  # which transformers leaves there
                yield from (f"{title}.{name}" for name in own)


# switching it off


def without(model_class: Any, feature: str) -> Any:
    """The class with ``feature`` switched off."""
    title, _, name = feature.partition(".")
    if title == "model":
        changed = {name: inherited(model_class, name)}
    elif title == "adapter":
        adapter = model_class.adapter_class
        changed = {"adapter_class": type(adapter.__name__, (adapter,), {name: inherited(adapter, name)})}
    else:
        changed = {"decoder_spec": staticmethod(lambda config: switched(model_class.decoder_spec(config), feature))}
    return type(model_class.__name__, (model_class,), changed)


def inherited(family: type, name: str) -> Any:
    """What the classes above the family's hold under ``name``."""
    package = family.__module__.rpartition(".")[0]
    above = [owner for owner in family.__mro__ if not owner.__module__.startswith(package)]
    return next(vars(owner)[name] for owner in above if name in vars(owner))


def switched(spec: Any, path: str) -> Any:
    """``spec`` with the slot at ``path`` as the common decoder has it."""
    name, _, rest = path.partition(".")
    if name == "mlp":
        arguments = dict(getattr(spec.mlp, "keywords", {}))
        if not rest:
            return replace(spec, mlp=partial(CombinedGateUpMLP, **arguments))
        arguments.pop(rest, None)
        return replace(spec, mlp=partial(spec.mlp.func, **arguments))
    return replace(spec, **{name: switched(getattr(spec, name), rest) if rest else default_of(spec, name)})


def default_of(spec: Any, name: str) -> Any:
    if name in REQUIRED:
        return REQUIRED[name](getattr(spec, name))
    slot: Field[Any] = next(slot for slot in fields(spec) if slot.name == name)
    return slot.default if slot.default is not MISSING else slot.default_factory()  # type: ignore[misc]


# noticing it


def caught(subject: Subject, model_class: Any, names: tuple[str, ...] = ()) -> str:
    """What the first failing check says with ``model_class`` as the implementation; empty where none fails."""
    changed = copy.copy(subject)
    changed.target = replace(subject.target, model_class=model_class)
    vars(changed)["scratch"] = Path(tempfile.mkdtemp(dir=subject.scratch))
    checks = {check.name: check.run for check in all_checks(subject.target) if not check.slow} | FINER
    for name in names or (*FAST, *(name for name in checks if name not in FAST)):
        torch.manual_seed(0)
        try:
            outcome = checks[name](changed)
        except NotApplicable:
            continue
        except Exception as error:
            return f"{name}: {type(error).__name__}: {error}"
        if not outcome.passed:
            return f"{name}: {outcome.detail}"
    return ""


def starts_alike(subject: Subject) -> Outcome:
    """Norm weights, biases and what else is no matrix start as in transformers."""
    classes = (subject.target.reference_class, subject.target.model_class)
    reference, ours = (model_class._from_config(copy.deepcopy(subject.config)) for model_class in classes)
    actual = ours.state_dict_adapter.to_hf(ours.state_dict())
    vectors = [(name, value) for name, value in reference.state_dict().items() if value.ndim < 2]
    return judge([bitwise(name, actual[name], value) for name, value in vectors], "vectors start alike")


def norms_in_fp32(subject: Subject) -> Outcome:
    """A norm of bf16 input whose weight is in fp32: how far it is from float64, beside the reference's."""
    reference, ours = (dict(model.named_modules()) for model in (subject.reference(), subject.ours()))
    name = next((name for name in reference if re.fullmatch(r"\w+\.\w*norm", name)), "")  # the one after the last layer
    norm, inputs = reference.get(name), torch.randn(512, subject.config.hidden_size).bfloat16()
    if name not in ours or isinstance(norm, nn.LayerNorm | None) or norm(inputs).dtype != torch.bfloat16:
        raise NotApplicable("transformers' norm gives another dtype, or an error on a GPU")
    low = norm(inputs), ours[name](inputs)
    with Exact():
        truth = norm.double()(inputs.double())
    errors = [(x.double() - truth).square().mean().sqrt().item() for x in low]
    return judge([Difference(name, errors[1], MARGIN_IN_BF16 * errors[0])], "a norm with its weight in fp32")


def turned_heads(subject: Subject) -> Outcome:
    """What attention scores, of one input in bf16, value by value: a rounding too many changes a fifth of it."""
    spec = subject.target.model_class.decoder_spec(subject.config)
    if spec.qk_norm or spec.attention_softcap:
        raise NotApplicable("norms round in an order of their own; the spy knows no softcap")
    heads: list[Tensor] = []

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        heads.extend(x.sort().values for x in (query, key))  # the order of channels may be another one
        return query.transpose(1, 2), None

    AttentionInterface.register("spy", spy)
    reference, ours = subject.reference(torch.bfloat16), subject.ours(torch.bfloat16)
    theirs, own = (calls_of(model, subject.tokens(4)) for model in (reference, ours))
    name = next(name for name in theirs if re.search(r"\.0\.\w*att\w*$", name))
    reference.config._attn_implementation = ours.config._attn_implementation = "spy"
    with torch.no_grad():
        theirs[name].again()
        own[name].again(hidden_states=theirs[name].input)
    shares = [(x != y).float().mean().item() for x, y in zip(heads[:2], heads[2:], strict=True)]
    # a sum in another order flips a rounding now and then
    return judge([Difference("query", shares[0], 0.02), Difference("key", shares[1], 0.02)], "queries and keys")


FINER: dict[str, Callable[[Subject], Outcome]] = {
    "starts alike": starts_alike,
    "norms in fp32": norms_in_fp32,
    "turned heads": turned_heads,
}
"""Beside verify's checks: what these leave open within their margins."""

FAST = ("loads", "layer by layer", *FINER, "rounding by module", "training mode")
"""Checks that catch nearly all at once; the others follow."""
