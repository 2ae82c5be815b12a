"""A loaded model is an ordinary `PreTrainedModel`: the tools people use take it as they take transformers' own."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments

from nemo_automodel import NeMoAutoModelForCausalLM
from tests.conftest import assert_near, tokens
from tests.recipes.conftest import checkpoint, rows  # noqa: F401  (fixtures)

ROWS = Dataset.from_dict({"input_ids": tokens(16, 12).tolist(), "labels": tokens(16, 12).tolist()})


def _arguments(folder: Path, **more: object) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        seed=0,
        **more,
    )


def test_trainer_trains_it_as_transformers_own_and_reloads_the_best(checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    """The Trainer reloads the best checkpoint by `load_state_dict` with Hugging Face's names, and does not raise."""
    finals = {}
    for name, auto in (("hf", AutoModelForCausalLM), ("ours", NeMoAutoModelForCausalLM)):
        model = auto.from_pretrained(checkpoint, dtype=torch.float32)
        options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
        trainer = Trainer(
            model, _arguments(tmp_path / name, max_steps=6, **options), train_dataset=ROWS, eval_dataset=ROWS
        )
        trainer.train()
        finals[name] = trainer
    losses = [[row["loss"] for row in finals[name].state.log_history if "loss" in row] for name in ("hf", "ours")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # printed to four digits
    assert losses[1][-1] < losses[1][0]
    best = finals["ours"].state.best_model_checkpoint
    reloaded = LlamaForCausalLM.from_pretrained(best)
    ids = tokens(1, 8)
    assert_near(finals["ours"].model.eval()(ids).logits, reloaded(ids).logits)


def test_trl_sft_trains_it(checkpoint: Path, rows: Path, tmp_path: Path) -> None:  # noqa: F811
    from trl import SFTConfig, SFTTrainer

    model = NeMoAutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_json(str(rows), cache_dir=str(tmp_path / "cache")),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]


def test_peft_adapts_the_fused_projections(checkpoint: Path) -> None:  # noqa: F811
    model = NeMoAutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = tokens(2, 10)
    plain = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv_proj", "gate_up_proj", "down_proj"]))
    assert_near(adapted(ids).logits, plain)  # B starts at zero
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted(input_ids=ids, labels=ids).loss.backward()
    names = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert names
    assert all("lora_" in name for name in names)
    logits = adapted(ids).logits
    assert (logits - plain).abs().max() > 1e-3
    # under Hugging Face's names the same adapter fits the separate projections
    tensors = model.state_dict_adapter.to_hf(get_peft_model_state_dict(adapted))
    assert {key.split(".")[-3] for key in tensors} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert_near(merged(ids).logits, logits)


def test_lm_eval_scores_it_as_transformers_own(checkpoint: Path) -> None:  # noqa: F811
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    pairs = [("what colour is", " red"), ("number", " green blue"), ("what", " is number what")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    scores = []
    for auto in (AutoModelForCausalLM, NeMoAutoModelForCausalLM):
        model = auto.from_pretrained(checkpoint, dtype=torch.float32)
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
        scores.append(harness.loglikelihood(requests, disable_tqdm=True))
    assert [greedy for _, greedy in scores[0]] == [greedy for _, greedy in scores[1]]
    expected, actual = ([value for value, _ in score] for score in scores)
    assert actual == pytest.approx(expected, abs=1e-4)  # sums of fp32 log-probabilities near -10
    assert all(value < -1 for value in expected)
