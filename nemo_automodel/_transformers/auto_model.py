"""Load or build a model by its config's architecture, ours where it is registered, else transformers' own."""

import copy
import logging
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from nemo_automodel._transformers import registry
from nemo_automodel.components.models.common.backend import BackendConfig
from nemo_automodel.components.models.common.hf_checkpointing_mixin import fetch, resolve_dtype

logger = logging.getLogger(__name__)

_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")


class _NeMoAutoModel:
    """What the auto classes share; each names transformers' class for the same task."""

    _suffix: ClassVar[str]
    _fallback: ClassVar[Any]
    _by_model_type: ClassVar[Mapping[str, str]]

    def __init__(self) -> None:
        raise TypeError(f"use {type(self).__name__}.from_pretrained(path) or .from_config(config)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: PreTrainedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        backend: BackendConfig | Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Load a Hugging Face checkpoint into the registered class of its architecture.

        An architecture that is not registered is loaded by transformers' own class, and a log line says so.

        Args:
            pretrained_model_name_or_path: a local folder, or a Hub id where a hub can be reached.
            config: instead of the checkpoint's own.
            dtype: of the parameters: a `torch.dtype`, its name, or None/"auto" for the checkpoint's own.
            torch_dtype: the older name of ``dtype``.
            attn_implementation: ``"eager"``, ``"sdpa"``, ``"flex_attention"``, ...; default: ``backend.attn``.
            backend: a `BackendConfig` or its fields as a dict.
            device: where the parameters go.
            trust_remote_code: run Python code that comes with the checkpoint (never without being asked to).
            **kwargs: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` for the Hub; any other name must be
                a field of the config, which it overrides.

        Raises:
            CheckpointError: the checkpoint is missing, damaged, or does not fit the config.
            ValueError: the checkpoint needs ``trust_remote_code``, or the architecture is not of this task.
        """
        hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
        folder = fetch(pretrained_model_name_or_path, **hub)
        overrides = kwargs
        if config is None:
            config, overrides = AutoConfig.from_pretrained(
                folder, trust_remote_code=trust_remote_code, return_unused_kwargs=True, **kwargs
            )
        if overrides:
            raise TypeError(f"{cls.__name__}.from_pretrained got an unknown option {next(iter(overrides))!r}")
        config = copy.deepcopy(config)
        backend = BackendConfig.of(backend).apply_to(config, attn_implementation)
        dtype = dtype if dtype is not None else torch_dtype
        if (model_class := cls._resolve(config)) is not None:
            model = model_class.from_pretrained(folder, config=config, dtype=dtype, backend=backend, device=device)
        else:
            model = cls._fallback.from_pretrained(
                folder,
                config=config,
                dtype=dtype if dtype is not None else "auto",
                trust_remote_code=trust_remote_code,
            ).to(device)
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        return model

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig | str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        backend: BackendConfig | Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ) -> PreTrainedModel:
        """Build a model with random weights, as for pretraining.

        Args:
            config: a config, or the folder or Hub id that has one; the other arguments are `from_pretrained`'s.
            dtype: of the parameters (default: the config's, else float32).
            torch_dtype: the older name of ``dtype``.
            attn_implementation: as for `from_pretrained`.
            backend: as for `from_pretrained`.
            device: where the parameters go.
            trust_remote_code: as for `from_pretrained`.
        """
        if isinstance(config, str | os.PathLike):
            config = AutoConfig.from_pretrained(fetch(config), trust_remote_code=trust_remote_code)
        config = copy.deepcopy(config)
        assert isinstance(config, PreTrainedConfig)
        backend = BackendConfig.of(backend).apply_to(config, attn_implementation)
        resolved = resolve_dtype(dtype if dtype is not None else torch_dtype, config, None)
        model_class = cls._resolve(config)
        if model_class is None:
            return cls._fallback.from_config(config, dtype=resolved, trust_remote_code=trust_remote_code).to(device)
        before = torch.get_default_dtype()
        torch.set_default_dtype(resolved)
        try:
            with torch.device(device):
                return model_class.from_config(config, backend=backend)
        finally:
            torch.set_default_dtype(before)

    @classmethod
    def _resolve(cls, config: PreTrainedConfig) -> Any:
        """The registered class for this task, or None for transformers' own (logged)."""
        named = [name for name in config.architectures or () if name.endswith(cls._suffix)]
        architecture = named[0] if named else cls._by_model_type.get(config.model_type)
        if architecture is None:
            raise ValueError(
                f"{cls.__name__}: architectures={config.architectures} with model_type={config.model_type!r} is not "
                f"a model {cls._suffix}"
            )
        if (model_class := registry.resolve(architecture)) is None:
            logger.warning(
                "%s is not among the registered architectures (%s): using transformers' own class, unfused",
                architecture,
                ", ".join(registry.architectures()),
            )
        return model_class


class NeMoAutoModelForCausalLM(_NeMoAutoModel):
    """Causal language models: ``from_pretrained(path)``, ``from_config(config)``."""

    _suffix = "ForCausalLM"
    _fallback = AutoModelForCausalLM
    _by_model_type = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


class NeMoAutoModelForSequenceClassification(_NeMoAutoModel):
    """Classifiers and rerankers. A causal-LM checkpoint gets a score head at random, and a log line says so."""

    _suffix = "ForSequenceClassification"
    _fallback = AutoModelForSequenceClassification
    _by_model_type = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
