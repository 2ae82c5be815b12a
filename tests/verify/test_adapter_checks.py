"""Adapters of right implementations pass; mistakes in scale, place, magnitude and export are caught."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, Qwen2Config

from nemo_automodel._transformers import registry
from nemo_automodel.components.peft import files, lora
from nemo_automodel.components.peft.config import Update
from nemo_automodel.verify import Target, find_target
from nemo_automodel.verify.checks import adapters
from nemo_automodel.verify.outcome import NotApplicable
from nemo_automodel.verify.subject import Subject

HEADS = {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 192, "vocab_size": 500}
LLAMA = LlamaConfig(**HEADS, tie_word_embeddings=True, attention_bias=True)
CHECKS = {check.name: check.run for check in adapters.CHECKS}
BY_HAND = Path(__file__).parents[2] / "examples" / "hand_written_model.py"


def target_of(name: str, folder: Path) -> Target:
    if name == "by hand":
        LLAMA.save_pretrained(folder)
        return find_target(BY_HAND, folder, "LlamaForCausalLM")
    config = {"llama": LLAMA, "qwen2": Qwen2Config(**HEADS)}[name]
    return Target.of(registry.resolve({"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[name]), config)


@pytest.mark.parametrize("name", ["llama", "qwen2", "by hand"])
def test_right_adapters_pass(name: str, tmp_path: Path) -> None:
    with Subject(target_of(name, tmp_path)) as subject:
        for check in CHECKS.values():
            outcome = check(subject)
            assert outcome.passed, outcome.detail
        parts = {path.rpartition(".")[2] for path in adapters.draw_targets(subject, subject.reference())}
        assert len(parts) == 7, f"only {parts} are adapted"
        stored = load_file(subject.checkpoint / "model.safetensors").values()
        assert {value.dtype for value in stored} == {torch.float32}, "written inside a check's Exact"


def swap_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = lora._factors

    def swapped(layer: Any, *args: Any) -> Any:
        a, b = factors(layer, *args)
        if "k_proj" in layer.parts:
            query, key, value = layer.fusion.split(b)
            b = layer.fusion.fuse([query, value, key])
        return a, b

    monkeypatch.setattr(lora, "_factors", swapped)


def norm_of_the_base_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = lora.LoRALinear._factor
    monkeypatch.setattr(lora.LoRALinear, "_factor", lambda self, w, a, b, m: factor(self, w, a, 0 * b, m))


def merge_without_magnitudes(monkeypatch: pytest.MonkeyPatch) -> None:
    merged = lora.LoRALinear.merged_weight

    def plain(self: Any) -> Any:
        self.dora = False
        return merged(self)

    monkeypatch.setattr(lora.LoRALinear, "merged_weight", plain)


def one_alpha_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = files._ranks
    monkeypatch.setattr(files, "_ranks", lambda *args: ranks(*args) | {"alpha_pattern": {}})


def round_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    save = files.save_file
    monkeypatch.setattr(files, "save_file", lambda t, *a, **k: save({n: x.half() for n, x in t.items()}, *a, **k))


def upside_down_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Update, "scale", property(lambda self: self.r / self.alpha))


@pytest.mark.parametrize(
    ("mistake", "caught_by"),
    [
        (upside_down_scale, "LoRA equals peft"),
        (upside_down_scale, "merged adapter"),
        (swap_keys_and_values, "LoRA equals peft"),
        (norm_of_the_base_alone, "DoRA equals peft"),
        (merge_without_magnitudes, "merged adapter"),
        (one_alpha_in_the_file, "adapter reloads in peft"),
        (round_in_the_file, "adapter reloads in peft"),
    ],
)
def test_mistakes_are_caught(
    mistake: Callable[[pytest.MonkeyPatch], None], caught_by: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mistake(monkeypatch)
    with Subject(target_of("llama", tmp_path)) as subject:
        assert CHECKS[caught_by](subject).passed is False


def test_without_peft_there_is_nothing_to_compare_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with Subject(target_of("llama", tmp_path)) as subject, pytest.raises(NotApplicable, match="pip install peft"):
        CHECKS["LoRA equals peft"](subject)
