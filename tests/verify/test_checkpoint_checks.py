"""Real weights and speed: what passes, what is refused, and what a spoiled implementation is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_automodel.components.models.llama import model as llama
from nemo_automodel.verify import find_target, verify
from nemo_automodel.verify.checks import all_checks, checkpoint, speed
from nemo_automodel.verify.outcome import NotApplicable, Outcome
from nemo_automodel.verify.subject import Subject
from nemo_automodel.verify.target import Target
from tests.components.checkpoint.test_block_fp8 import quantize
from tests.conftest import randomize, tiny
from tests.recipes.conftest import write_checkpoint


def save(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    randomize(LlamaForCausalLM(tiny(LlamaConfig, **changes))).to(dtype).save_pretrained(folder)
    return folder


def run(target: Target) -> dict[str, Outcome]:
    with Subject(target) as subject:
        return {check.name: check.run(subject) for check in checkpoint.CHECKS}


@pytest.mark.parametrize("tied", [False, True])
def test_a_right_implementation_passes_in_the_folders_dtype_and_in_fp32(tmp_path: Path, tied: bool) -> None:
    outcomes = run(find_target(save(tmp_path, tie_word_embeddings=tied)))
    assert all(outcome.passed for outcome in outcomes.values()), outcomes
    assert [each.name for each in outcomes["logits"].differences] == ["logits in bfloat16", "logits in float32"]
    assert "float64" in outcomes["logits"].detail
    stored = 20 if tied else 21  # a tied head is compared where the folder has it
    assert len(outcomes["round trip"].differences) == stored


def test_text_is_the_sample_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    with checkpoint._Real(find_target(write_checkpoint(tmp_path / "with"))) as real:
        words = checkpoint.load_tokenizer(tmp_path / "with").decode(real.tokens(1, 24)[0])
    assert checkpoint.TEXT.startswith(words)
    assert len(words) > 20
    with checkpoint._Real(find_target(save(tmp_path / "without"))) as real:
        assert real.tokens(3, 50).shape == (3, 50)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_above_the_size_for_float64_the_reference_in_fp32_is_the_truth(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "EXACT_PARAMETERS", 1)
    outcome = run(find_target(save(tmp_path, dtype)))["logits"]
    assert outcome.passed, outcome
    assert "too large for float64" in outcome.detail
    assert [each.name for each in outcome.differences] == ["logits in bfloat16", "logits in float32"]
    assert 0 < outcome.differences[1].bound < 1e-4


def test_a_quantized_folder_round_trips_dequantized_and_is_not_run(tmp_path: Path) -> None:
    stored = load_file(save(tmp_path) / "model.safetensors")
    for name in [name for name in stored if name.endswith("proj.weight")]:
        stored[name], stored[f"{name}_scale_inv"] = quantize(stored[name].float(), (16, 16))
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = verify(tmp_path, quick=True)
    assert report.passed, report.failures()
    assert {r.name: r.word for r in report.results if r.group == "real weights"} == {
        "round trip": "pass",
        "logits": "n/a",
        "greedy tokens": "n/a",
    }


def test_a_round_trip_in_another_dtype_than_stored_says_so(tmp_path: Path) -> None:
    stored = load_file(save(tmp_path) / "model.safetensors")
    stored["model.norm.weight"] = stored["model.norm.weight"].float() + 1e-6
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Subject(find_target(tmp_path)) as subject:
        outcome = checkpoint.real_round_trip(subject)
    assert outcome.passed, outcome.detail
    assert outcome.detail.endswith("; 1 stored in float32 and compared in bfloat16")


def test_what_does_not_fit_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = find_target(save(tmp_path))

    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("loaded")

    with monkeypatch.context() as patch, Subject(target) as subject:
        patch.setattr(Subject, "ours", load)
        patch.setattr(Subject, "reference", load)
        patch.setattr(checkpoint, "_free_memory", lambda device: 1000)
        for check in checkpoint.CHECKS:
            with pytest.raises(NotApplicable, match="parameters would take"):
                check.run(subject)
    assert checkpoint._free_memory(torch.device("cpu")) > 2**20


@pytest.fixture
def spoiled(tmp_path: Path) -> Target:
    """Saves its norm weights a little off, and scales its logits."""

    class SpoiledForCausalLM(llama.LlamaForCausalLM):
        def save_pretrained(self, folder: Any, **options: Any) -> None:
            with torch.no_grad():
                self.model.norm.weight[0] += 1
            super().save_pretrained(folder, **options)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * 1.01
            outputs.logits[..., 7] += 50
            return outputs

    target = find_target(save(tmp_path / "model"))
    return Target.of(SpoiledForCausalLM, target.config, checkpoint=target.checkpoint)


def test_a_spoiled_one_is_told_what_is_wrong(spoiled: Target) -> None:
    outcomes = run(spoiled)
    assert [outcome.passed for outcome in outcomes.values()] == [False, False, False]
    assert "model.norm.weight" in outcomes["round trip"].detail
    assert "logits in float32" in outcomes["logits"].detail


def test_only_folders_with_weights_have_these_checks(tmp_path: Path) -> None:
    groups = [{check.group for check in all_checks(find_target(t))} for t in (save(tmp_path), tmp_path / "config.json")]
    assert groups[0] - groups[1] == {"real weights"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.safetensors"])
def test_weights_that_are_not_read_are_one_row_that_says_so(tmp_path: Path, name: str) -> None:
    (save(tmp_path) / "model.safetensors").rename(tmp_path / name)
    target = find_target(tmp_path)
    assert target.checkpoint is None
    (check,) = (check for check in all_checks(target) if check.group == "real weights")
    with Subject(target) as subject, pytest.raises(NotApplicable, match=f"{name} is not verified: .* holds "):
        check.run(subject)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_speed_compares_a_wider_model_of_the_same_structure(architecture: str) -> None:
    with Subject(find_target(architecture)) as subject:
        middle = speed._middle(subject.config)
        assert middle.hidden_size == speed.FACTOR * subject.config.hidden_size
        assert middle.num_attention_heads // middle.num_key_value_heads == 3
        outcome = speed.training_speed(subject)
    assert "sdpa" in outcome.detail
    assert "of the reference's" in outcome.detail


def test_a_slow_implementation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowForCausalLM(llama.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            for _ in range(5):
                outputs = super().forward(*args, **kwargs)
            return outputs

    monkeypatch.setattr(speed, "MOST_ROUNDS", 5)
    target = find_target("LlamaForCausalLM")
    with Subject(Target.of(SlowForCausalLM, target.config, reference=target.reference_class)) as subject:
        outcome = speed.training_speed(subject)
    assert outcome.passed is False
    assert "nothing else runs" in outcome.detail
