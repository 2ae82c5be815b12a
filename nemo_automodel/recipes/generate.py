"""Answers from a trained folder: one prompt, or a batch of conversations."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.tokenizer import load_tokenizer
from nemo_automodel.recipes.building import pick_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Message = dict[str, str]


def generate(
    folder: str | Path,
    prompt: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    device: str = "auto",
    seed: int = 0,
) -> str:
    """The model's answer to ``prompt``: a chat turn where the tokenizer has a chat template, else the continuation.

    Args:
        folder: checkpoint folder or Hub id.
        prompt: the user's text.
        system: system message, for chat models only.
        max_new_tokens: the most tokens to answer with.
        temperature: 0 always takes the likeliest token.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        seed: of the sampling.

    Raises:
        CheckpointError: the folder cannot be loaded.
        ValueError: a system message for a model without a chat template.
    """
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template and system is not None:
        raise ValueError(f"{folder} has no chat template, so it takes no system message")
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, device=pick_device(device))
    torch.manual_seed(seed)
    if tokenizer.chat_template:
        messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]
        return generate_batch(model, tokenizer, [messages], max_new_tokens, temperature=temperature)[0]
    return _complete(model, tokenizer, [prompt], max_new_tokens, temperature)[0]


def generate_batch(
    model: "PreTrainedModel",
    tokenizer: Any,
    conversations: Sequence[list[Message]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """One answer per conversation (each ends with a user's turn), in batches of similar length."""
    texts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in conversations
    ]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers = [""] * len(texts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = _complete(model, tokenizer, [texts[i] for i in chosen], max_new_tokens, temperature, special=False)
        for i, answer in zip(chosen, batch, strict=True):
            answers[i] = answer
        progress(min(start + batch_size, len(order)))
    return answers


@torch.no_grad()
def _complete(
    model: "PreTrainedModel",
    tokenizer: Any,
    texts: list[str],
    max_new_tokens: int,
    temperature: float,
    special: bool = True,
) -> list[str]:
    if tokenizer.pad_token is None:  # padding is masked, so any token will do
        tokenizer = copy.copy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    # a chat template writes BOS itself, so the tokenizer must not add a second one
    encoded = tokenizer(texts, add_special_tokens=special, padding=True, padding_side="left", return_tensors="pt")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    tokens = cast("Any", model).generate(
        **encoded.to(model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    return tokenizer.batch_decode(tokens[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
