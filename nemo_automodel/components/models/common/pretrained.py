"""What every way of loading a model needs first: the folder, the config with its overrides, the dtype."""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from nemo_automodel.components.checkpoint import CheckpointError, SafetensorsReader, TensorReader

_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
_SIDE_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
# other formats' copies of the same weights, which some repositories hold as well
_NOT_FETCHED = ["*/*", "consolidated*"]


def pop_hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options that are for the Hub out of ``options``."""
    return {name: options.pop(name) for name in _HUB_OPTIONS if name in options}


def fetch(path: str | os.PathLike[str], *, weights: bool = True, code: bool = False, **hub: Any) -> Path:
    """The local folder of a checkpoint: ``path`` itself, or the Hub's files of that id, downloaded once.

    Args:
        path: a folder, or a Hub id.
        weights: False leaves the weights on the Hub.
        code: whether Python files come along (for ``trust_remote_code``).
        **hub: ``revision``, ``cache_dir``, ``token``, ``local_files_only``.

    Raises:
        CheckpointError: neither a folder nor an id that the Hub gives out.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            SafetensorsReader(folder)  # which says what the folder holds instead of a checkpoint
        return folder
    if folder.suffix == ".gguf":
        raise CheckpointError(f"{folder}: run `automodel convert {folder} --out DIR` and load DIR")
    if folder.exists() or folder.is_absolute() or str(path).startswith(".") or str(path).count("/") > 1:
        raise CheckpointError(f"{folder} is not a checkpoint folder")
    patterns = _SIDE_FILES + (_WEIGHTS if weights else []) + (["*.py"] if code else [])
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns, ignore_patterns=_NOT_FETCHED, **hub))
    except Exception as error:  # the hub client raises a dozen unrelated types, offline ones included
        raise CheckpointError(
            f"{path!s} is not a local folder, and the Hub did not give it out: {type(error).__name__}: {error}"
        ) from error


def overridden(config: PreTrainedConfig, options: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy of ``config`` with the fields in ``options`` set.

    Raises:
        TypeError: an option that is no field of the config.
    """
    config = copy.deepcopy(config)
    for name, value in options.items():
        if not hasattr(config, name):
            hint = " (say device=)" if name == "device_map" else ""
            raise TypeError(f"unknown option {name!r}: no option of from_pretrained, no field of the config{hint}")
        setattr(config, name, value)
    return config


def resolve_dtype(
    dtype: torch.dtype | str | None, config: PreTrainedConfig, reader: TensorReader | None
) -> torch.dtype:
    """The dtype asked for; for None and "auto" the config's, else that of the checkpoint's first float tensor.

    Raises:
        ValueError: not the name of a floating-point dtype.
    """
    if dtype in (None, "auto"):
        dtype = config.dtype
    if dtype is None:
        stored = (reader.dtype(key) for key in reader) if reader is not None else iter(())
        dtype = next((found for found in stored if found.is_floating_point), torch.float32)
    resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is not a floating-point dtype such as 'float32' or 'bfloat16'")
    return resolved


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` torch's default for new parameters."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def read_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Give ``model`` the generation config of ``folder``, where there is one and the model can use it."""
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def write_configs(model: PreTrainedModel, folder: Path) -> None:
    """Write config and generation config into ``folder``."""
    model.config.dtype = model.dtype
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
