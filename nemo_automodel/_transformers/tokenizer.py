"""Tokenizers, checked against the model they are to feed, and GGUF files as Hugging Face folders."""

import os
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from nemo_automodel.components.checkpoint import CheckpointError, publish_folder
from nemo_automodel.components.models.common.pretrained import fetch


def load_tokenizer(path: str | os.PathLike[str], trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint.

    Raises:
        CheckpointError: there is none, or it has more tokens than the model has embeddings.
    """
    folder = fetch(path, weights=False, code=trust_remote_code)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no tokenizer that transformers can load: {error}") from error
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens but config.json says vocab_size={config.vocab_size}; "
            "use the tokenizer the model was trained with, or resize the model's embeddings and save it again"
        )
    return tokenizer


def convert_gguf(file: str | os.PathLike[str], out: str | os.PathLike[str], dtype: torch.dtype) -> Path:
    """Write the Hugging Face folder (weights, config, tokenizer, chat template) that a GGUF file holds.

    Args:
        file: the ``.gguf`` file; quantized weights are dequantized.
        out: the folder to write.
        dtype: of the weights.

    Raises:
        CheckpointError: no such file, or not one that transformers can read.
    """
    file = Path(file)
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist")
    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise CheckpointError(f"{file} is not a GGUF file (it does not start with 'GGUF')")
    hf_logging.disable_progress_bar()  # three bars for a few seconds' work
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(f"{file} cannot be converted: {error}") from error
    finally:
        hf_logging.enable_progress_bar()
    # the weights are dequantized by now, but transformers would still refuse to save them
    cast("Any", model).hf_quantizer = None
    del model.config.quantization_config

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return publish_folder(out, write)
