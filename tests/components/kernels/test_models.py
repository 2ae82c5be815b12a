"""Whole models on the interpreted kernels: transformers' loss and gradients, with adapters, made again, saved."""

import copy
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nemo_automodel.components.kernels import qkv_rope
from nemo_automodel.components.layout import Fusion
from nemo_automodel.components.loss import next_token_loss
from nemo_automodel.components.models.common import norm
from nemo_automodel.components.peft import LoRAConfig, apply_lora, join_adapters, merge_lora
from nemo_automodel.components.peft.files import save_adapter
from nemo_automodel.components.peft.model import leaf, lora_layers, part_paths
from nemo_automodel.config import load_config
from nemo_automodel.recipes import train as recipe
from nemo_automodel.recipes.train import TrainConfig, train
from tests.components.kernels.cases import counted, distance
from tests.conftest import VOCAB, assert_near, assert_same_gradients, tiny, tokens, twins
from tests.recipes.conftest import checkpoint, overrides, rows  # noqa: F401  (fixtures)

pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")]

PARTIAL = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, tiny(LlamaConfig)),
    "llama, tied, biases": (
        LlamaForCausalLM,
        tiny(LlamaConfig, tie_word_embeddings=True, mlp_bias=True, attention_bias=True),
    ),
    "qwen2": (Qwen2ForCausalLM, tiny(Qwen2Config)),
    "qwen3": (Qwen3ForCausalLM, tiny(Qwen3Config, head_dim=8)),
    "gemma": (GemmaForCausalLM, tiny(GemmaConfig, head_dim=16)),
    "gemma2": (Gemma2ForCausalLM, tiny(Gemma2Config, "eager", head_dim=16, sliding_window=5)),
    "phi3": (Phi3ForCausalLM, tiny(Phi3Config, rope_parameters=PARTIAL, pad_token_id=0)),
    "cohere": (CohereForCausalLM, tiny(CohereConfig)),
}
NEAR = 1e-4
"""Of the largest number: torch's own operations in fp32 are up to 4e-5 from float64 in these random models."""
SCALED = {"gemma", "gemma2"}
"""Families whose embeddings are multiplied, which is a class of its own."""
LAYER_NORM = {"cohere"}
"""Families whose norms have no kernel."""

ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 4},
    "some": {"r": 4, "targets": ["q_proj", "up_proj", "down_proj"]},
    "several": {"r": 4, "rank_pattern": {"k_proj": 2, "layers.1.*up_proj": 6}, "alpha_pattern": {"v_proj": 3}},
}
PACKED = torch.cat([torch.arange(5), torch.arange(3), torch.arange(4)])[None]


def _first(names: Iterable[Any], *kept: Any) -> list[Any]:
    """``names``, of which those that are not ``kept`` belong to the longer suites."""
    return [name if name in kept else pytest.param(*_several(name), marks=pytest.mark.slow) for name in names]


def _several(name: Any) -> tuple[Any, ...]:
    return name if isinstance(name, tuple) else (name,)


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "NARROW", 1)
    monkeypatch.setattr(qkv_rope, "TOKENS", 32)  # the interpreter takes its time by the program


def _batch(length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    ids = tokens(2, length, seed)
    labels = ids.clone()
    labels[:, :2] = -100
    labels[1, 5] = -100
    return {"input_ids": ids, "labels": labels}


def _adapted(model: Any, options: dict[str, Any], joined: bool = False) -> Any:
    apply_lora(model, LoRAConfig(**options), model.state_dict_adapter.layout)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    if joined:
        for _, layer in lora_layers(model):
            layer.join()  # whatever its rank is; `join_adapters` joins those that a GPU reads well
    return model


def _step(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = next_token_loss(model, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize(
    ("family", "packed"),
    _first(
        itertools.product(FAMILIES, (False, True)),
        ("llama, tied, biases", True),
        ("qwen2", False),
        ("qwen3", False),
        ("gemma", False),
    ),
)
def test_full(family: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hf, ours = twins(*FAMILIES[family])
    calls = counted(monkeypatch)
    batch = _batch()
    if packed:
        ids = tokens(1, 12)
        batch = {"input_ids": ids, "labels": ids, "position_ids": PACKED}
    expected = next_token_loss(hf, batch)
    actual = next_token_loss(ours, batch)
    assert_near(actual, expected, NEAR, what="loss")
    for loss in (expected, actual):
        loss.backward()
    assert_same_gradients(ours, hf, NEAR)
    assert calls["rope"] == 2
    assert calls["loss"] == 1
    tied = ours.lm_head.weight is ours.model.embed_tokens.weight
    assert calls.get("tied", 0) == (tied and family not in SCALED)
    assert calls.get("linear", 0) >= 2  # at least what reads the gated activation
    assert (calls.get("norm", 0) >= 5) == (family not in LAYER_NORM)


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq"])
def test_embeddings_with_gradients_of_their_own_kind_make_them_apart(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, calls = twins(*FAMILIES["llama, tied, biases"])[1], counted(monkeypatch)
    setattr(ours.model.embed_tokens, option, True)
    next_token_loss(ours, _batch())
    assert calls["loss"] == 1
    assert "tied" not in calls


def _as_stored(fusion: Fusion | None, part: str, b: torch.Tensor) -> torch.Tensor:
    """B's rows in the order in which checkpoints keep those of its weight."""
    return b if fusion is None else fusion.to_stored(b, part)


KINDS = [*(("llama", name) for name in ADAPTERS), *((family, "all") for family in FAMILIES if family != "llama")]


@pytest.mark.parametrize(
    ("family", "adapters", "joined"),
    _first(
        ((*kind, joined) for kind in KINDS for joined in (False, True)),
        *(("llama", "some", True), ("llama", "several", True), ("gemma", "all", False), ("phi3", "all", True)),
    ),
)
def test_adapters(family: str, adapters: str, joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``W + s B A`` in transformers' model, whose gradient G gives those of A and B: ``s B^T G`` and ``s G A^T``."""
    hf, ours = twins(*FAMILIES[family])
    _adapted(ours, ADAPTERS[adapters], joined)
    merged = merge_of(ours)
    hf.load_state_dict(merged.state_dict_adapter.to_hf(merged.state_dict()), strict=False)
    calls = counted(monkeypatch)
    batch = _batch()
    expected, actual = next_token_loss(hf, batch), next_token_loss(ours, batch)
    assert_near(actual, expected, NEAR, what="loss")
    for loss in (expected, actual):
        loss.backward()
    layers = dict(lora_layers(ours))
    assert calls["linear"] >= len(layers)
    theirs, layout = {name: p.grad for name, p in hf.named_parameters()}, ours.state_dict_adapter.layout
    for path, layer in layers.items():
        of_part = {leaf(hf_path): theirs[f"{hf_path}.weight"] for hf_path in part_paths(path, layout)}
        for part, update in layer.updates.items():
            g = of_part[part]
            a, b = layer.lora_A[part], layer.lora_B[part]
            assert a.grad is not None
            assert b.grad is not None
            b, of_b = (_as_stored(layout.fusion_of(path), part, each.detach()) for each in (b, b.grad))
            assert_near(a.grad, update.scale * b.t() @ g, NEAR, what=f"{path} {part} A")
            assert_near(of_b, update.scale * g @ a.detach().t(), NEAR, what=f"{path} {part} B")
    frozen = [p for name, p in ours.named_parameters() if "lora_" not in name]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def merge_of(model: Any) -> Any:
    """A copy with its adapters folded in."""
    merged = copy.deepcopy(model)
    merge_lora(merged)
    return merged


@pytest.mark.parametrize(
    ("family", "adapters"), _first(itertools.product(("llama", "gemma"), (None, "all", "some")), ("llama", "all"))
)
def test_made_again(family: str, adapters: str | None) -> None:
    _, ours = twins(*FAMILIES[family])
    if adapters is not None:
        _adapted(ours, ADAPTERS[adapters], joined=True)
        ours.enable_input_require_grads()  # as checkpointing does: a first layer without makes other products
    ours.train()
    expected = _step(ours, _batch())
    ours.gradient_checkpointing_enable()
    actual = _step(ours, _batch())
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [None, *ADAPTERS])
def test_bf16_is_as_near_float64_as_torchs_operations(adapters: str | None) -> None:
    """Mean over seeds of the mean over all gradients, in a model small in its numbers.

    With weights and adapters as large as in the other tests attention saturates, and bf16's errors grow to tens of per
    cent in one seed or another, with or without kernels.
    """
    errors: dict[str, float] = {"kernels": 0.0, "torch": 0.0, "joined": 0.0}
    for seed in range(4):
        config = tiny(LlamaConfig, hidden_size=64, intermediate_size=96)
        models = {}
        for name in errors:
            backend = {"kernels": "torch" if name == "torch" else "auto"}
            _, models[name] = twins(LlamaForCausalLM, copy.deepcopy(config), seed, backend=backend)
            models[name].bfloat16()
            if adapters is not None:
                _adapted(models[name], ADAPTERS[adapters], joined=name == "joined")
            with torch.no_grad():
                for key, parameter in models[name].named_parameters():
                    parameter.mul_(0.25 if "lora_" in key else 0.5 if parameter.ndim == 2 else 1)
        exact = copy.deepcopy(models["torch"]).double()
        for _, layer in lora_layers(models["torch"]):
            layer._fuses = lambda x: False  # type: ignore[method-assign, assignment]
        truth = _step(exact, _batch(seed=seed))
        for name, model in models.items():
            outcome = _step(model, _batch(seed=seed))
            errors[name] += sum(distance(value, truth[key]) for key, value in outcome.items()) / len(truth) / 4
    assert 0 < errors["kernels"] < 1.1 * errors["torch"], errors
    assert 0 < errors["joined"] < 1.1 * errors["torch"], errors


@pytest.mark.parametrize(
    ("family", "adapters"), _first(itertools.product(("llama", "gemma", "phi3"), (None, "all")), ("llama", "all"))
)
def test_generation(family: str, adapters: str | None) -> None:
    hf, ours = twins(*FAMILIES[family])
    if adapters is not None:
        _adapted(ours, ADAPTERS[adapters], joined=True)
        merged = merge_of(ours)
        hf.load_state_dict(merged.state_dict_adapter.to_hf(merged.state_dict()), strict=False)
    ids = tokens(1, 5)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": VOCAB}
    expected = hf.generate(ids, **options)
    assert torch.equal(ours.generate(ids, **options), expected)
    assert torch.equal(ours.generate(ids, use_cache=False, **options), expected)


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("adapters", _first(ADAPTERS, "several"))
def test_a_joined_model_is_saved_as_any(adapters: str, tmp_path: Path) -> None:
    """After a step, which leaves B beside the weight."""
    _, ours = twins(*FAMILIES["llama"])
    models = {name: _adapted(copy.deepcopy(ours), ADAPTERS[adapters], name == "joined") for name in ("apart", "joined")}
    for name, model in models.items():
        if name == "joined":
            _step(model, _batch())
        (tmp_path / name / "adapter").mkdir(parents=True)
        save_adapter(model, tmp_path / name / "adapter", LoRAConfig(**ADAPTERS[adapters]))
        merge_lora(model)
        model.save_pretrained(tmp_path / name / "merged")
    for part in ("adapter", "merged"):
        assert _files(tmp_path / "joined" / part) == _files(tmp_path / "apart" / part)


@pytest.mark.slow
def test_training_resumes(
    overrides: Callable[..., list[str]],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, with joined adapters."""
    calls = counted(monkeypatch)
    options = {"lora__r": 4, "train__max_steps": 3, "train__save_every": 1, "train__batch_size": 2}
    options["train__micro_batch_size"] = 1
    joined: list[int] = []
    monkeypatch.setattr(
        "nemo_automodel.recipes.building.join_adapters", lambda model: joined.append(1) or join_adapters(model)
    )

    def run(out: str, **more: Any) -> None:
        train(load_config(TrainConfig, None, overrides(out, **options, **more)), say=lambda line: None)

    run("whole")
    assert joined
    assert calls["linear"] > 0
    step = recipe.Run.step

    def killed(self: recipe.Run, number: int) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(recipe.Run, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run("broken")
    monkeypatch.setattr(recipe.Run, "step", step)
    run("broken")
    whole, broken = (_files(tmp_path / name / "hf") for name in ("whole", "broken"))
    assert broken == whole
