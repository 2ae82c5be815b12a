"""Tokenizers and chat templates made here, so that nothing is downloaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from nemo_automodel.components.data import Audit, DataConfig, Example, Examples, build_dataset

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
CORPUS = ["the quick brown fox says hello there\n\n", "user assistant system what is two plus two? four!", "[INST] ok"]

# One template for each way of ending a turn. {mark} and {end} become generation tags, or nothing.
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{mark}"
    "{{ m['content'] + '<|im_end|>' }}{end}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama2": "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] }}"
    "{{ ' [/INST]' }}{% else %}{mark}{{ ' ' + m['content'] + ' ' + eos_token }}{end}{% endif %}{% endfor %}",
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' }}{% if m['role'] == "
    "'assistant' %}{mark}{{ m['content'] | trim + '<|im_end|>' }}{end}{% else %}"
    "{{ m['content'] | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}",
    "think": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and not "
    "loop.last %}{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "endless": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "tools": "{% for t in tools or [] %}{{ t['name'] }};{% endfor %}{% for m in messages %}{{ m['role'] + ':' }}"
    "{{ m['content'] + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
}
TALK = [
    {"role": "user", "content": "what is two plus two?"},
    {"role": "assistant", "content": "four!"},
    {"role": "user", "content": "says the fox?"},
    {"role": "assistant", "content": "the quick\n\nbrown fox"},
]


@pytest.fixture
def talk() -> list[dict[str, str]]:
    return [dict(message) for message in TALK]


@pytest.fixture(scope="session")
def template() -> Callable[..., str]:
    """The template of a name, as it is or with other tags around what the assistant writes."""

    def get(name: str, mark: str = "", end: str = "") -> str:
        return TEMPLATES[name].replace("{mark}", mark).replace("{end}", end)

    return get


@pytest.fixture(scope="session")
def make_tokenizer(template: Callable[..., str]) -> Callable[..., PreTrainedTokenizerFast]:
    """Byte-level BPE tokenizers, by the name of a template or the template itself."""
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    base.train_from_iterator(CORPUS * 4, trainer)
    plain = base.to_str()

    def make(
        chat: str | None = None, bos: bool = False, trim: bool = False, eos: str = "</s>"
    ) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer.from_str(plain)
        steps: list[Any] = [processors.ByteLevel(trim_offsets=trim)]
        if bos:
            steps.append(processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]))
        tokenizer.post_processor = processors.Sequence(steps)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token=eos)
        fast.chat_template = template(chat) if chat in TEMPLATES else chat
        return fast

    return make


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., tuple[list[Example], Audit]]:
    """Build examples from rows written to a file."""

    def run(rows: list[dict[str, Any]], tokenizer: Any, **config: Any) -> tuple[list[Example], Audit]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        examples, audit = build_dataset(path, None, tokenizer, DataConfig(train=str(path), **config))
        return list(examples), audit

    return run


@pytest.fixture
def make_examples() -> Callable[[list[int]], Examples]:
    """Examples of given lengths, all their tokens different and supervised."""

    def make(lengths: list[int]) -> Examples:
        examples, first = Examples(), 1
        for length in lengths:
            examples.append(list(range(first, first + length)), b"\1" * length)
            first += length
        return examples

    return make
