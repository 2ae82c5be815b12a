"""`automodel merge`: the receipt, what the export holds, and what is refused."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.cli import main
from nemo_automodel.recipes.merge import Distance, merge
from tests.conftest import assert_near, randomize, tiny, tokens
from tests.recipes.conftest import CHATML, checkpoint  # noqa: F401  (fixture)


def write_adapter(model: Path, folder: Path) -> Path:
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj", "down_proj"], use_dora=True),
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(folder)
    return folder


def test_the_export_is_the_adapted_model_with_its_tokenizer(
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter, out = write_adapter(checkpoint, tmp_path / "adapter"), tmp_path / "out"
    assert main(["merge", str(checkpoint), str(adapter), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "on 4 sample texts" in text
    assert "adapter vs reloaded export" in text
    ids = tokens(1, 7)
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), adapter).eval()(ids).logits
    assert_near(AutoModelForCausalLM.from_pretrained(out)(ids).logits, expected)
    assert_near(NeMoAutoModelForCausalLM.from_pretrained(checkpoint, adapter=adapter)(ids).logits, expected)
    assert AutoTokenizer.from_pretrained(out).chat_template == CHATML
    for again, words in ((out, "holds a model or an adapter already"), (checkpoint, "model's own folder")):
        assert main(["merge", str(checkpoint), str(adapter), "--out", str(again)]) == 2
        assert words in capsys.readouterr().err


def test_without_a_tokenizer_the_receipt_says_so(tmp_path: Path) -> None:
    randomize(LlamaForCausalLM(tiny())).save_pretrained(tmp_path / "model")
    receipt = merge(tmp_path / "model", write_adapter(tmp_path / "model", tmp_path / "a"), tmp_path / "out")
    assert "256 random token ids" in receipt.samples
    assert "no tokenizer" in receipt.samples
    assert receipt.export == Distance(0, 0)
    assert receipt.merged.logits < 1e-4
    assert abs(receipt.merged.kl) < 1e-6


def test_distance_is_kl_and_the_largest_difference() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    distance = Distance.between([p], [q + 1])  # a constant changes the logits, not the distribution
    assert distance.kl == pytest.approx(0.25 * torch.tensor(2.0).log().item())
    assert distance.logits == pytest.approx(1 + torch.tensor(2.0).log().item())
