"""A checkpoint folder small enough to train in a test: a tiny Llama with a byte-level chat tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.conftest import randomize

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_checkpoint(folder: Path, **changes: Any) -> Path:
    """A tiny Llama and its tokenizer, as transformers saves them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["red green blue what colour is number"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    options = {"tie_word_embeddings": True, "vocab_size": len(fast), "eos_token_id": 1, "bos_token_id": None}
    options |= {"max_position_embeddings": 256, **changes}
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    torch.manual_seed(0)
    randomize(LlamaForCausalLM(config)).save_pretrained(folder)
    return folder


def write_rows(file: Path, count: int) -> Path:
    """Conversations of unequal length."""
    colours = ["red", "green", "blue"]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what colour is number {i}?" + " please" * (i % 4)},
                {"role": "assistant", "content": colours[i % 3] + "!" * (i % 3)},
            ]
        }
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", 22)


@pytest.fixture
def overrides(checkpoint: Path, rows: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Command-line overrides of a small training in ``tmp_path/run``."""

    def make(out: str = "run", **more: Any) -> list[str]:
        values: dict[str, Any] = {
            "output_dir": tmp_path / out,
            "model.path": checkpoint,
            "data.train": rows,
            "train.batch_size": 6,
            "train.micro_batch_size": 4,
            "train.epochs": 2,
            "optim.lr": "1e-2",
            "optim.warmup_steps": 2,
            **{name.replace("__", "."): value for name, value in more.items()},
        }
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    return make
