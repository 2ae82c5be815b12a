"""The quickstart: on a tiny model quickly, on the real weights in full (slow)."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.cli import main
from nemo_automodel.recipes.quickstart import smollm2


def test_every_step_runs_on_another_model(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["quickstart", "--out", str(out), "--model", str(checkpoint), "--steps", "2"]) == 0
    text = capsys.readouterr().out
    assert "exactly right on 120 held-out orders: 0 before, 0 after" in text
    assert f"automodel generate {out / 'hf'}" in text
    result = json.loads((out / "quickstart.json").read_text())
    assert result["held_out"] == 120
    assert set(result["seconds"]) == {"scoring_before", "training", "scoring_after", "total"}
    assert len((out / "data" / "train.jsonl").read_text().splitlines()) == 16
    AutoModelForCausalLM.from_pretrained(out / "hf")


@pytest.fixture(scope="session")
def smol() -> Path:
    return smollm2()


@pytest.mark.slow
def test_real_weights_give_transformers_tokens(smol: Path) -> None:
    """SmolLM2-135M: logits within fp32 rounding of 30 layers, greedy tokens exactly, with and without cache."""
    hf = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)
    ours = NeMoAutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smol)
    for question in ("What is the capital of France?", "Write three words that rhyme with day."):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        torch.testing.assert_close(ours(ids).logits, hf(ids).logits, atol=2e-3, rtol=0)  # logits reach 30
        expected = hf.generate(ids, max_new_tokens=24, do_sample=False)
        for cache in (True, False):
            assert torch.equal(ours.generate(ids, max_new_tokens=24, do_sample=False, use_cache=cache), expected)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


@pytest.mark.slow
def test_quickstart_teaches_the_real_model(smol: Path, tmp_path: Path) -> None:
    """A part of the recipe's steps is enough to tell learning from luck: no random answer is ever exactly right."""
    assert main(["quickstart", "--out", str(tmp_path / "out"), "--steps", "40"]) == 0
    result = json.loads((tmp_path / "out" / "quickstart.json").read_text())
    assert result["before"] == 0
    assert result["after"] >= 20
