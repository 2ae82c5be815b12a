"""LoRA and DoRA adapters: what peft computes, keeps and merges, on the reference's separate projections."""

import random
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemo_automodel.components.peft import PeftAdapter, adapter_tensors, layout_of, merge_lora, stored_rows
from nemo_automodel.verify.check import Check
from nemo_automodel.verify.exact import Exact
from nemo_automodel.verify.outcome import NotApplicable, Outcome, bitwise, formula, judge
from nemo_automodel.verify.subject import Subject, step

METHODS = {"LoRA": {"use_dora": False}, "DoRA": {"use_dora": True}}
PART, OTHER = {"r": 3, "lora_alpha": 5}, {"r": 2, "lora_alpha": 7}
"""Rank and alpha of most projections, and of every third: scales that differ, and are not one."""

_SEED = 170  # over two layers it draws every projection of Llama's, and keys and values together


def lora(subject: Subject) -> Outcome:
    """Logits and every adapter's gradient in float64."""
    return _same_step(subject, "LoRA")


def dora(subject: Subject) -> Outcome:
    """The same with magnitudes, whose row norms are taken over the projections' own rows."""
    return _same_step(subject, "DoRA")


def _same_step(subject: Subject, method: str) -> Outcome:
    with Exact():
        theirs, folder = trained_by_peft(subject, method)
        ours = with_adapter(subject, folder)
        expected, actual = step(theirs, subject.tokens()), step_of_adapters(ours, subject.tokens())
    gradients = {_stored_name(name): gradient for name, gradient in expected.gradients.items()}
    if gradients.keys() != actual.keys() - {"logits"}:
        return Outcome(False, f"adapters that are on one side only: {sorted(gradients.keys() ^ actual.keys())[:4]}")
    differences = [
        formula(name, actual[name], value) for name, value in {"logits": expected.logits, **gradients}.items()
    ]
    return judge(differences, f"logits and {len(gradients)} gradients of adapters on {_targets(gradients)}")


def reload_in_peft(subject: Subject) -> Outcome:
    """What ``save_adapter`` writes is, for peft, the adapter that it wrote itself."""
    peft, differences = _peft(), []
    for method in METHODS:
        with Exact(), torch.no_grad():
            theirs, folder = trained_by_peft(subject, method)
            with_adapter(subject, folder).save_adapter(folder / "saved")
            again = peft.PeftModel.from_pretrained(subject.reference(torch.float64), folder / "saved")
            logits = [model(subject.tokens(), use_cache=False).logits for model in (again, theirs)]
        actual, expected = (peft.get_peft_model_state_dict(model) for model in (again, theirs))
        if actual.keys() != expected.keys():
            return Outcome(False, f"{method}: keys that came or went: {sorted(actual.keys() ^ expected.keys())[:4]}")
        differences += [bitwise(f"{method} {key}", actual[key], expected[key]) for key in expected]
        differences.append(formula(f"{method} logits, reloaded", *logits))
    return judge(differences, f"{len(differences) - len(METHODS)} tensors saved and loaded by peft, every bit")


def merged(subject: Subject) -> Outcome:
    """Adapters folded into the weights give the logits that peft gives with the adapters beside them."""
    differences = []
    for method in METHODS:
        with Exact(), torch.no_grad():
            theirs, folder = trained_by_peft(subject, method)
            merge_lora(ours := with_adapter(subject, folder))
            logits = [model(subject.tokens(), use_cache=False).logits for model in (ours, theirs)]
        differences.append(formula(f"{method} merged, logits", *logits))
    return judge(differences, "LoRA and DoRA folded into the weights")


CHECKS = [
    Check("adapters", "LoRA equals peft", lora),
    Check("adapters", "DoRA equals peft", dora),
    Check("adapters", "adapter reloads in peft", reload_in_peft),
    Check("adapters", "merged adapter", merged),
]


def trained_by_peft(subject: Subject, method: str) -> tuple[Any, Path]:
    """The reference with an adapter as after training, none of its tensors trivial; and the folder it is saved in.

    Raises:
        NotApplicable: peft is not installed.
    """
    peft, reference = _peft(), subject.reference(torch.float64)
    targets = draw_targets(subject, reference)
    others = [f"^{target.replace('.', '[.]')}$" for target in targets[::3]]
    config = peft.LoraConfig(
        target_modules=targets,
        rank_pattern=dict.fromkeys(others, OTHER["r"]),
        alpha_pattern=dict.fromkeys(others, OTHER["lora_alpha"]),
        **PART,
        **METHODS[method],
    )
    model = peft.get_peft_model(reference, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder = subject.scratch / method
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval(), folder


def draw_targets(subject: Subject, reference: Any) -> list[str]:
    """Paths of some of the reference's linear layers: of every fused projection some parts, and never all."""
    layout = layout_of(subject.ours())
    head = reference.get_output_embeddings()
    fused: dict[str, list[str]] = defaultdict(list)
    for path, module in reference.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            fused[layout.locate(f"{path}.weight").own].append(path)
    draw = random.Random(_SEED)
    drawn = [
        path
        for parts in fused.values()
        for path in draw.sample(parts, draw.randint(min(1, len(parts) - 1), max(1, len(parts) - 1)))
    ]
    if not drawn:
        raise NotApplicable("no linear layer to adapt")
    return drawn


def with_adapter(subject: Subject, folder: Path) -> Any:
    """The implementation with the adapter in ``folder``, as the auto classes load it."""
    adapter = PeftAdapter.read(folder)
    model = subject.ours(torch.float64, prepare=adapter.prepare)
    adapter.load(model)
    return model


def step_of_adapters(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Logits, and the adapters' gradients under peft's names."""
    outputs = model(input_ids=ids, labels=ids, use_cache=False)
    outputs.loss.backward()
    gradients = {key: grad for key, p in adapter_tensors(model).items() if (grad := p.grad) is not None}
    return {"logits": outputs.logits.detach(), **stored_rows(model, gradients)}


def _stored_name(name: str) -> str:
    """peft's name of a parameter -> the one in its files."""
    return name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")


def _targets(gradients: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({name.split(".lora_")[0].rpartition(".")[2] for name in gradients}))


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise NotApplicable(f"peft is not here to compare with: pip install peft ({error})") from error
    return peft
