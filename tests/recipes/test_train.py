"""The training loop against an independent one, and what it promises: resume, export, refusals."""

import gc
import json
import os
import shutil
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_automodel.components.checkpoint import CheckpointError
from nemo_automodel.components.optim import adamw
from nemo_automodel.config import ConfigError, load_config
from nemo_automodel.recipes import building
from nemo_automodel.recipes import train as recipe
from nemo_automodel.recipes.export import export_checkpoint
from nemo_automodel.recipes.train import TrainConfig, TrainingError, train
from tests.recipes.conftest import write_checkpoint

Overrides = Callable[..., list[str]]


def run(words: list[str]) -> recipe.Summary:
    return train(load_config(TrainConfig, None, words), say=lambda line: None)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_equals_a_plain_loop_in_transformers(overrides: Overrides, checkpoint: Path, tmp_path: Path) -> None:
    """Full fine-tuning, unequal micro-batches: each step is AdamW on the mean over ALL valid tokens of the batch."""
    config = load_config(TrainConfig, None, overrides(train__max_steps=5))
    # the stream's batches are taken as given; model, loss, schedule, clipping and optimizer are written out again
    batches = recipe.Run(config, lambda line: None).stream
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    expected = []
    for step in range(5):
        micro_batches = next(batches)
        total = sum((b["labels"][:, 1:] != -100).sum() for b in micro_batches)
        loss = sum(model(**b, num_items_in_batch=total).loss for b in micro_batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            done = (step - 2) / 2
            group["lr"] = 1e-2 * ((step + 1) / 3 if step < 2 else 0.5 * (1 + torch.cos(torch.pi * torch.tensor(done))))
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())

    (tmp_path / "run" / "metrics.jsonl").unlink()
    summary = run(overrides(train__max_steps=5))
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)  # fp32 rounding, five steps deep
    trained = AutoModelForCausalLM.from_pretrained(summary.hf_folder)
    for name, parameter in model.named_parameters():
        # Adam divides by sqrt(v): entries with tiny gradients turn rounding into a share of lr = 1e-2
        torch.testing.assert_close(trained.get_parameter(name), parameter, atol=2e-4, rtol=0)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora__r": 4, "lora__dropout": 0.2},
        {"data__packing": "true", "data__max_length": 128, "train__batch_size": 2, "train__micro_batch_size": 1},
        {"model__dtype": "bfloat16"},
        {"model__dtype": "bfloat16", "optim__masters": "stochastic", "optim__moments": "bfloat16"},
    ],
    ids=["full", "lora with dropout", "packed", "bf16 with masters", "bf16 alone"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    options = {"train__max_steps": 7, "train__save_every": 3, **options}
    run(overrides("whole", **options))

    step = recipe.Run.step

    def killed(self: recipe.Run, number: int) -> dict[str, float]:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(recipe.Run, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(overrides("broken", **options))
    monkeypatch.setattr(recipe.Run, "step", step)
    assert len(losses(tmp_path / "broken")) == 4  # one step past the checkpoint, to be done again
    torch.rand(3)  # another process has another generator state
    run(overrides("broken", **options))

    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    expected, actual = weights(tmp_path / "whole" / "hf"), weights(tmp_path / "broken" / "hf")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert "lm_head.weight" not in actual  # tied: one storage through save, resume and export


@pytest.mark.parametrize("base_dtype", ["auto", "float8"])
def test_lora_exports_what_peft_and_transformers_load(base_dtype: str, overrides: Overrides, checkpoint: Path) -> None:
    lora = {"lora__targets": "[q_proj, v_proj, down_proj]", "lora__r": 4, "lora__base_dtype": base_dtype}
    summary = run(overrides(train__max_steps=4, **lora))
    assert summary.adapter_folder is not None
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.arange(3, 40)[None]
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, summary.adapter_folder)(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(summary.hf_folder)(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)  # W + BA rounded once against twice
    assert (adapted - plain).abs().max() > 1e-2  # it learned something
    described = json.loads((summary.adapter_folder / "adapter_config.json").read_text())
    assert described["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert described["base_model_name_or_path"] == str(checkpoint)


def test_writes_what_it_says(overrides: Overrides, rows: Path, tmp_path: Path) -> None:
    summary = run(overrides(data__validation=rows, train__save_every=2, train__keep_last=1))
    folder = tmp_path / "run"
    assert summary.steps == 8  # 22 rows in batches of 6, two epochs
    assert summary.val_loss is not None
    files = {path.name for path in folder.iterdir()}
    assert files == {
        *("hf", "checkpoints", "metrics.jsonl", "tensorboard", "config.yaml", "data_audit.json", "loss.png"),
    }
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert all(path in "\n".join(summary.lines()) for path in ("hf", "metrics.jsonl", "loss.png", "checkpoints"))
    rows_logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows_logged if "val_loss" in row] == [4, 8]  # once per epoch
    assert load_config(TrainConfig, folder / "config.yaml", []) == load_config(
        TrainConfig, None, overrides(data__validation=rows, train__save_every=2, train__keep_last=1)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    assert tokenizer.chat_template
    best = min((row for row in rows_logged if "val_loss" in row), key=lambda row: row["val_loss"])["step"]
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {"step-00000008", f"step-{best:08d}"}


def test_running_a_finished_run_again_trains_nothing(overrides: Overrides, tmp_path: Path) -> None:
    run(overrides(train__max_steps=2))
    before = weights(tmp_path / "run" / "hf")
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run(overrides(train__max_steps=2)).steps == 2
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == logged
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "run" / "hf").items())


def test_another_configuration_in_the_same_folder_is_refused(overrides: Overrides) -> None:
    run(overrides(train__max_steps=2))
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.01 then, 0\.5 now"):
        run(overrides(train__max_steps=2, optim__lr=0.5))


def test_a_folder_with_a_run_but_no_checkpoint_is_refused(overrides: Overrides, tmp_path: Path) -> None:
    (tmp_path / "run" / "hf").mkdir(parents=True)
    with pytest.raises(ValueError, match="choose another folder"):
        run(overrides())


def test_a_run_that_died_before_its_first_checkpoint_starts_over(overrides: Overrides, tmp_path: Path) -> None:
    training = recipe.Run(load_config(TrainConfig, None, overrides(train__max_steps=2)), lambda line: None)
    training.step(1)
    for at, row in training.rows(until=1):
        training.metrics.log(at, **row)
    run(overrides(train__max_steps=2))
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_under_way(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    run(overrides("whole", train__max_steps=4, train__save_every=4))
    step = recipe.Run.step

    def signalled(self: recipe.Run, at: int) -> dict[str, float]:
        if at == 2:
            os.kill(os.getpid(), number)
        return step(self, at)

    monkeypatch.setattr(recipe.Run, "step", signalled)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        run(overrides(train__max_steps=4, train__save_every=4))
    assert signal.getsignal(number) is before
    monkeypatch.setattr(recipe.Run, "step", step)
    assert len(losses(tmp_path / "run")) == 2
    run(overrides(train__max_steps=4, train__save_every=4))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_the_best_checkpoint_is_judged_by_its_own_validation(overrides: Overrides, rows: Path, tmp_path: Path) -> None:
    run(overrides(data__validation=rows, train__max_steps=6, train__validate_every=3, train__save_every=2))
    states = sorted((tmp_path / "run" / "checkpoints").glob("*/state.json"))
    metrics = {state.parent.name[-1]: json.loads(state.read_text())["metric"] for state in states}
    assert metrics["4"] is None  # validated at 3 and 6, saved at 2, 4 and 6
    assert metrics["6"] is not None


def test_an_attention_that_mixes_packed_documents_is_refused(
    overrides: Overrides, checkpoint: Path, tmp_path: Path
) -> None:
    """OPT in transformers reads no document borders from position_ids."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=300, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=40
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "opt")
    with pytest.raises(ValueError, match=r"data\.packing=true: with OPTForCausalLM .* see each other"):
        run(overrides(model__path=tmp_path / "opt", data__packing="true", data__max_length=128))


@pytest.mark.parametrize(
    ("tokens", "positions", "packing", "rounded"),
    [
        (4 * 128, 128, False, True),
        (4 * 128 - 1, 128, False, False),  # the longest rows have no graph
        (4 * 128, 127, False, False),
        (4 * 128, None, False, True),
        (4 * 128, 128, True, False),
        (None, 128, False, False),  # no graphs
    ],
)
def test_lengths_are_rounded_up_where_each_then_has_a_cuda_graph(
    overrides: Overrides, tokens: int | None, positions: int | None, packing: bool, rounded: bool
) -> None:
    sizes = {"train__batch_size": 8, "train__micro_batch_size": 4, "data__packing": str(packing).lower()}
    config = load_config(TrainConfig, None, overrides("run", **sizes))
    graphs = None if tokens is None else SimpleNamespace(tokens=tokens)
    model = SimpleNamespace(
        base_model=SimpleNamespace(graphs=graphs), config=SimpleNamespace(max_position_embeddings=positions)
    )
    stream: Any = SimpleNamespace(multiple_of=1)
    building.let_lengths_recur(model, stream, config, longest=65)
    assert stream.multiple_of == (64 if rounded else 1)


def test_examples_longer_than_the_models_positions_are_refused(overrides: Overrides, tmp_path: Path) -> None:
    short = write_checkpoint(tmp_path / "short", max_position_embeddings=16)
    with pytest.raises(ValueError, match=r"longest example has \d+ tokens, but .*max_position_embeddings is 16"):
        run(overrides(model__path=short))


@pytest.mark.parametrize(
    ("key", "value"), [("model__path", "/nowhere/x"), ("data__train", "no.jsonl"), ("data__chat_template", "no.jinja")]
)
def test_a_missing_file_is_named_with_its_key(overrides: Overrides, key: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key.replace('__', '.')}: .*{value.split('.')[0]}"):
        run(overrides(**{key: value}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_stops_before_the_weights_change(overrides: Overrides, dtype: str) -> None:
    """Also where the next step, whose gradients are finite, was queued before the host knew."""
    assert_nan_changes_nothing(overrides(train__max_steps=4, model__dtype=dtype))


def assert_nan_changes_nothing(words: list[str]) -> recipe.Run:
    training = recipe.Run(load_config(TrainConfig, None, words), lambda line: None)
    training.step(1)
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    weight = training.model.model.norm.weight
    weight.data[0] = float("nan")
    training.step(2)
    weight.data.copy_(before["model.norm.weight"])
    training.step(3)
    rows = training.rows(until=3)
    assert next(rows)[0] == 1
    with pytest.raises(TrainingError, match=r"step 2: the loss is nan and the gradients' norm is nan\. Nothing was"):
        next(rows)
    after = training.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return training


def test_reading_a_step_later_changes_nothing(
    overrides: Overrides, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: every row comes, in order, with its own validation loss, and what is saved was read before."""
    options = {"train__max_steps": 7, "train__save_every": 3, "train__validate_every": 2, "data__validation": rows}
    run(overrides("at_once", **options))
    prepare = recipe.Run.__init__

    def ahead(self: recipe.Run, *args: Any) -> None:
        prepare(self, *args)
        self.ahead = 1

    monkeypatch.setattr(recipe.Run, "__init__", ahead)
    run(overrides("later", **options))
    logged = []
    for out in ("at_once", "later"):
        lines = map(json.loads, (tmp_path / out / "metrics.jsonl").read_text().splitlines())
        logged.append([{k: v for k, v in row.items() if k not in ("tokens_per_second", "memory_gb")} for row in lines])
    assert logged[0] == logged[1]
    assert [row["step"] for row in logged[1]] == list(range(1, 8))
    states = [
        json.loads((tmp_path / o / "checkpoints/step-00000006/state.json").read_text()) for o in ("at_once", "later")
    ]
    assert states[0]["state"] == states[1]["state"]


@pytest.mark.parametrize(("micro_batch_size", "dtype"), [(6, torch.bfloat16), (3, torch.float32)])
def test_gradients_are_in_fp32_where_several_add_up(
    overrides: Overrides, monkeypatch: pytest.MonkeyPatch, micro_batch_size: int, dtype: torch.dtype
) -> None:
    seen: set[torch.dtype] = set()
    shards = adamw._shards

    def spy(gradient: torch.Tensor) -> int:
        seen.add(gradient.dtype)
        return shards(gradient)

    monkeypatch.setattr(adamw, "_shards", spy)
    words = {"model__dtype": "bfloat16", "train__micro_batch_size": micro_batch_size, "train__max_steps": 2}
    run(overrides(**words))
    assert seen == {dtype}


def test_a_checkpoint_of_another_format_is_refused(overrides: Overrides, tmp_path: Path) -> None:
    run(overrides(train__max_steps=2))
    [file] = (tmp_path / "run" / "checkpoints").glob("*/state.json")
    content = json.loads(file.read_text())
    del content["state"]["format"]  # as before there were formats
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"step-00000002 has format 1, .* finish that run with the version it"):
        run(overrides(train__max_steps=2))


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(overrides: Overrides, tmp_path: Path) -> None:
    small = write_checkpoint(tmp_path / "small", vocab_size=200)
    with pytest.raises(CheckpointError, match=r"tokenizer has \d+ tokens but config.json says vocab_size=200"):
        run(overrides(model__path=small))


def test_pretraining_starts_from_the_config_alone(overrides: Overrides, checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "red green blue"}\n' * 8)
    (tmp_path / "empty").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "empty" / name).write_bytes((checkpoint / name).read_bytes())
    words = overrides(model__path=tmp_path / "empty", model__from_scratch="true", data__train=text, train__max_steps=30)
    assert run(words).loss < 0.5 * losses(tmp_path / "run")[0]


def test_gradient_checkpointing_changes_nothing(overrides: Overrides, tmp_path: Path) -> None:
    for out, setting in (("off", "false"), ("on", "true")):
        run(overrides(out, train__max_steps=3, model__gradient_checkpointing=setting, lora__r=2))
    assert losses(tmp_path / "off") == losses(tmp_path / "on")


def test_an_unregistered_architecture_trains_too(overrides: Overrides, checkpoint: Path, tmp_path: Path) -> None:
    from transformers import StableLmConfig, StableLmForCausalLM

    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = StableLmConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, intermediate_size=40, eos_token_id=1, **heads
    )
    folder = tmp_path / "stablelm"
    StableLmForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    for out, lora in (("full", {}), ("lora", {"lora__targets": "[o_proj, q_proj]"})):
        summary = run(overrides(out, model__path=folder, train__max_steps=6, **lora))
        assert summary.loss < losses(tmp_path / out)[0]
        assert AutoModelForCausalLM.from_pretrained(summary.hf_folder).config.model_type == "stablelm"


def test_an_empty_answer_is_nothing_to_learn(overrides: Overrides, tmp_path: Path) -> None:
    rows = tmp_path / "empty.jsonl"
    messages = [{"role": "user", "content": "what colour?"}, {"role": "assistant", "content": " "}]
    rows.write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(ValueError, match=r"^data\.train: .*no token is supervised"):
        run(overrides(data__train=rows))


def test_a_resumed_run_keeps_the_generation_config(overrides: Overrides, checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(checkpoint, source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2], "temperature": 0.6}))
    words = {"model__path": source, "train__max_steps": 2, "train__save_every": 1}
    training = recipe.Run(load_config(TrainConfig, None, overrides(**words)), lambda line: None)
    training.step(1)
    training.save(1)
    training.checkpoints.wait()
    summary = run(overrides(**words))
    exported = export_checkpoint(tmp_path / "run", tmp_path / "exported")
    for folder in (summary.hf_folder, exported):
        kept = json.loads((folder / "generation_config.json").read_text())
        assert (kept["eos_token_id"], kept["temperature"]) == ([5, 2], 0.6)


def test_buffers_are_saved_too(overrides: Overrides, tmp_path: Path) -> None:
    """A model that keeps a persistent buffer, as some of transformers' do."""

    def started() -> recipe.Run:
        training = recipe.Run(load_config(TrainConfig, None, overrides(train__max_steps=2)), lambda line: None)
        if "bias" not in training.model._buffers:
            training.model.register_buffer("bias", torch.zeros(3))
        return training

    training = started()
    training.model.bias += 7
    assert "model.bias" in training._tensors()
    assert sum(name.startswith("model.lm_head") for name in training._tensors()) == 0  # tied: once


def test_resuming_in_another_dtype_is_refused(overrides: Overrides) -> None:
    words = {"train__max_steps": 2, "train__save_every": 1}
    run(overrides(**words))
    resumed = load_config(TrainConfig, None, overrides(**words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "auto_dtype", lambda device: torch.bfloat16)  # what a GPU would take
        with pytest.raises(CheckpointError, match=r"trained in torch.float32, and here model.dtype='auto' means"):
            recipe.Run(resumed, lambda line: None)


def test_lora_on_random_weights_is_refused(overrides: Overrides) -> None:
    with pytest.raises(ConfigError, match="from_scratch=true with lora"):
        load_config(TrainConfig, None, overrides(model__from_scratch="true", lora__r=4))


@pytest.mark.parametrize("options", [{}, {"lora__r": 4}, {"model__gradient_checkpointing": "selective"}], ids=str)
def test_a_run_that_is_over_leaves_nothing_in_memory(overrides: Overrides, options: dict[str, Any]) -> None:
    """Where several follow each other in one process: a notebook, a sweep."""
    words = overrides(train__max_steps=2, model__dtype="bfloat16", **options)
    done = recipe.Run(load_config(TrainConfig, None, words), lambda line: None)
    for step in (1, 2):
        done.step(step)
    done.save(2)
    done.checkpoints.wait()
    left = [weakref.ref(x) for x in (done, done.model, done.optimizer, next(done.model.parameters()))]
    del done
    gc.collect()
    assert [x() is None for x in left] == [True] * 4
