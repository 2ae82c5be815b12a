"""Every Hugging Face tensor used once, every parameter filled, and the way back exact."""

import copy
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig

from nemo_automodel.components.models.common.tp_plan import layers_plan_of
from nemo_automodel.verify.check import Check
from nemo_automodel.verify.outcome import Outcome, bitwise, judge
from nemo_automodel.verify.subject import Subject

FIRST = "loads"

FOLDED = {"use_sliding_window", "max_window_layers", "sliding_window_pattern", "no_rope_layer_interval"}
"""Fields that config classes make ``layer_types`` (or ``no_rope_layers``) of, and nothing else."""

OF_EXPERTS = {"num_experts_per_tok", "router_aux_loss_coef"}
"""Fields that mean nothing where ``num_local_experts`` is 0."""


def loads(subject: Subject) -> Outcome:
    """The first check: where this one fails, no other can run."""
    model = subject.ours()
    return Outcome(True, f"{sum(p.numel() for p in model.parameters()):,} parameters")


def fields_read(subject: Subject) -> Outcome:
    """Every field of the config that the reference looks at while it computes is looked at here as well.

    A field that says nothing (None, False, zero) may be left unread.
    """
    ids = subject.tokens(1)
    read = []
    for model_class in (subject.target.reference_class, subject.target.model_class):
        config, names = _watched(subject.config)
        with torch.no_grad():
            model_class._from_config(config).to(subject.device)(ids, use_cache=False)
        read.append(names)
    own = vars(subject.config).keys() - vars(PreTrainedConfig()).keys()  # not what every model of transformers has
    if getattr(subject.config, "layer_types", None):
        own -= FOLDED
    if getattr(subject.config, "num_local_experts", None) == 0:
        own -= OF_EXPERTS
    missed = [name for name in sorted((read[0] - read[1]) & own) if getattr(subject.config, name)]
    if missed:
        shown = ", ".join(f"config.{name}={getattr(subject.config, name)!r}" for name in missed)
        return Outcome(False, f"the reference reads {shown}, and this implementation does not")
    return Outcome(True, f"{len(read[0])} attributes that the reference reads")


def _watched(config: PreTrainedConfig) -> tuple[PreTrainedConfig, set[str]]:
    """A copy of ``config``, and the names that are read from it from now on."""
    names: set[str] = set()
    aliases: dict[str, str] = config.attribute_map

    def read(self: Any, name: str) -> Any:
        names.add(aliases.get(name, name))
        return object.__getattribute__(self, aliases.get(name, name))

    watched = copy.deepcopy(config)
    watched.__class__ = type(type(config).__name__, (type(config),), {"__getattribute__": read})
    names.clear()
    return watched, names


def every_key_once(subject: Subject) -> Outcome:
    """Values are drawn without repetition: the own parameters must hold exactly those of the file, each once."""
    model, stored = subject.ours(), load_file(subject.checkpoint / "model.safetensors")
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in _tied(model)}
    unfilled = [name for name, tensor in own.items() if tensor.isnan().any()]
    if unfilled:
        return Outcome(False, f"{unfilled[0]} was not filled from the checkpoint ({len(unfilled)} such)")
    in_file, in_model = _multiset(stored), _multiset(own)
    if in_file != in_model:
        lost, extra = in_file - in_model, in_model - in_file
        lost_from = _holding(stored, lost)
        return Outcome(
            False,
            f"{lost.total()} values of the file are not in the model{lost_from}, {extra.total()} in the model are "
            f"not of the file{_holding(own, extra)}",
        )
    return Outcome(True, f"{len(stored)} tensors, {in_file.total():,} values, each in the model once")


def round_trip(subject: Subject) -> Outcome:
    """Hugging Face's state dict -> own -> Hugging Face's, in three dtypes."""
    differences = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stored = {k: v.to(dtype) for k, v in load_file(subject.checkpoint / "model.safetensors").items()}
        adapter = subject.ours().state_dict_adapter
        back = adapter.to_hf(adapter.from_hf(stored))
        if back.keys() != stored.keys():
            return Outcome(False, f"keys that came or went: {sorted(back.keys() ^ stored.keys())[:4]}")
        differences += [bitwise(f"{key} {dtype}".replace("torch.", ""), back[key], stored[key]) for key in stored]
    return judge(differences, "from_hf then to_hf gives back every bit, in fp32, bf16 and fp16")


def tied_storage(subject: Subject) -> Outcome:
    """A tied head is the embedding itself, and an untied one is not."""
    model = subject.ours()
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    ties = subject.config.tie_word_embeddings
    if ties and head is not embedding:
        return Outcome(False, "the config ties head and embedding, but they are two parameters here: one drifts")
    if not ties and head.data_ptr() == embedding.data_ptr():
        return Outcome(False, "the config does not tie head and embedding, but they are one storage here")
    return Outcome(True, "head and embedding are one parameter" if ties else "head and embedding are apart, as asked")


def reload_in_transformers(subject: Subject) -> Outcome:
    """What ``save_pretrained`` writes loads in the reference's class, key by key, bit by bit."""
    folder = subject.scratch / "saved"
    subject.ours().save_pretrained(folder)
    reference = subject.target.reference_class
    reloaded, info = reference.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            return Outcome(False, f"transformers reports {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:4]}")
    expected = subject.reference().state_dict()
    actual = reloaded.to(subject.device).state_dict()
    saved_as = json.loads((folder / "config.json").read_text())["architectures"]
    if saved_as != [reference.__name__] and saved_as != [subject.target.model_class.__name__]:
        return Outcome(False, f"config.json names architectures={saved_as}, which is neither class")
    return judge([bitwise(k, actual[k], expected[k]) for k in expected], "saved, loaded by transformers, every bit")


def config_kept(subject: Subject) -> Outcome:
    """Loading leaves the config as the file has it: what is saved later, and what other code reads, is the same."""
    expected, actual = (model.config.to_dict() for model in (subject.reference(), subject.ours()))
    skipped = ("_name_or_path", "architectures", "transformers_version")
    names = [n for n in {**expected, **actual} if expected.get(n) != actual.get(n) and n not in skipped]
    changed = [f"config.{name}: {actual.get(name)} instead of {expected.get(name)}" for name in names]
    return Outcome(not changed, "; ".join(changed) or f"{len(expected)} fields as in config.json")


def declarations(subject: Subject) -> Outcome:
    """The class attributes that parallelism, tying and device placement read name modules that exist."""
    model = subject.ours()
    modules = {_starred(name) for name, _ in model.named_modules()}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    plan = layers_plan_of(model)
    problems = [f"_tp_plan[{name!r}] matches no module" for name in plan if name not in modules]
    problems += [f"_pp_plan[{name!r}] matches no module" for name in (model._pp_plan or {}) if name not in modules]
    tied = getattr(model, "_tied_weights_keys", None) or {}
    problems += [
        f"_tied_weights_keys: {name!r} is no parameter" for name in {*tied, *tied.values()} if name not in parameters
    ]
    classes = {type(module).__name__ for module in model.modules()}
    problems += [
        f"_no_split_modules: {name} is no class in the model"
        for name in (model._no_split_modules or ())
        if name not in classes
    ]
    for name in ("_tp_plan", "_pp_plan", "_tied_weights_keys"):
        if not getattr(type(model), name, None):
            problems.append(f"{name} is not set on the class")
    return Outcome(
        not problems, "; ".join(problems) or f"{len(plan)} entries of the tensor-parallel plan, each matches a module"
    )


CHECKS = [
    Check("weights", FIRST, loads),
    Check("weights", "config fields read", fields_read),
    Check("weights", "every key used once", every_key_once),
    Check("weights", "round trip", round_trip),
    Check("weights", "tied storage", tied_storage),
    Check("weights", "reload in transformers", reload_in_transformers),
    Check("weights", "config kept", config_kept),
    Check("weights", "declared plans", declarations),
]


def _tied(model: torch.nn.Module) -> set[str]:
    """Names beyond the first under which one parameter goes."""
    first = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - first


def _multiset(tensors: Mapping[str, Tensor]) -> Counter[float]:
    return Counter(torch.cat([tensor.double().flatten().cpu() for tensor in tensors.values()]).tolist())


def _holding(tensors: Mapping[str, Tensor], values: Counter[float]) -> str:
    """The name of the tensor most of which is among ``values``; a few of any tensor are, by chance."""
    wanted = torch.tensor(list(values), dtype=torch.float64)
    shares = {name: torch.isin(t.double().flatten().cpu(), wanted).double().mean() for name, t in tensors.items()}
    name = max(shares, key=shares.__getitem__)
    return f" ({name})" if shares[name] > 0.5 else ""


def _starred(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
