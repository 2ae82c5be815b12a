"""Load or build a model by its config's architecture, ours where it is registered, else transformers' own."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
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
from nemo_automodel.components.checkpoint import CheckpointError, SafetensorsReader
from nemo_automodel.components.models.common.backend import BackendConfig
from nemo_automodel.components.models.common.pretrained import (
    default_dtype,
    fetch,
    overridden,
    pop_hub_options,
    read_generation_config,
    resolve_dtype,
)
from nemo_automodel.components.peft import PeftAdapter

logger = logging.getLogger(__name__)


def read_config(path: str | os.PathLike[str], trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a checkpoint folder, or of a Hub id's.

    Raises:
        CheckpointError: there is none.
    """
    folder = fetch(path, weights=False, code=trust_remote_code)
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return config


class _NeMoAutoModel:
    """What the auto classes share; each names transformers' class for the same task."""

    _suffix: ClassVar[str]
    _fallback: ClassVar[Any]
    _by_model_type: ClassVar[Mapping[str, str]]
    _new_heads: ClassVar[tuple[str, ...]] = ()  # parameters that a checkpoint of another task need not have

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
        prepare: Callable[[Any], None] | None = None,
        adapter: str | os.PathLike[str] | None = None,
        check_finite: bool = False,
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
            prepare: called with the model before its weights are there, to add adapters or shard it; see
                `HFCheckpointingMixin.from_pretrained`. (transformers' own classes: after the weights are.)
            adapter: a local folder with a LoRA or DoRA adapter in peft's format, put on top; it comes before
                ``prepare``. The model is frozen but for the adapter. See `PeftAdapter`.
            check_finite: refuse weights that are NaN or infinite, by name.
            **kwargs: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` for the Hub; any other name must be
                a field of the config, which it overrides.

        Raises:
            CheckpointError: the checkpoint is missing, damaged, or does not fit the config.
            ValueError: the checkpoint needs ``trust_remote_code``, the architecture is not of this task, or the
                adapter does not fit the model or cannot be honoured whole.
        """
        lora = PeftAdapter.read(adapter) if adapter is not None else None
        prepare = _in_turn(lora.prepare, prepare) if lora else prepare
        hub = pop_hub_options(kwargs)
        folder = fetch(pretrained_model_name_or_path, code=trust_remote_code, **hub)
        if config is None:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config = overridden(config, kwargs)
        backend = BackendConfig.of(backend).apply_to(config, attn_implementation)
        dtype = dtype if dtype is not None else torch_dtype
        if (model_class := cls._resolve(config)) is not None:
            model = model_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                backend=backend,
                device=device,
                prepare=prepare,
                check_finite=check_finite,
            )
        else:
            if check_finite:
                reader = SafetensorsReader(folder, check_finite=True)
                for key in reader:
                    reader.read(key)
            model = cls._load_transformers_own(folder, config, backend, dtype or "auto", trust_remote_code)
            model.to(torch.device(device))  # type: ignore[arg-type]  # its decorator hides the signature
            if prepare is not None:
                prepare(model)
        if lora is not None:
            lora.load(model)
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
        folder = None
        if isinstance(config, str | os.PathLike):
            folder = fetch(config, weights=False, code=trust_remote_code)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config must be a PreTrainedConfig, a folder or a Hub id, not {type(config).__name__}")
        config = overridden(config, {})
        backend = BackendConfig.of(backend).apply_to(config, attn_implementation)
        resolved = resolve_dtype(dtype if dtype is not None else torch_dtype, config, None)
        model_class = cls._resolve(config)
        if model_class is None:
            _refuse_kernels(config, backend)
            model = cls._fallback.from_config(config, dtype=resolved, trust_remote_code=trust_remote_code).to(device)
        else:
            config.__dict__.pop("quantization_config", None)  # its weights are plain
            with default_dtype(resolved), torch.device(device):
                model = model_class.from_config(config, backend=backend)
        if folder is not None:
            read_generation_config(model, folder)
        return model

    @classmethod
    def _load_transformers_own(
        cls,
        folder: Path,
        config: PreTrainedConfig,
        backend: BackendConfig,
        dtype: torch.dtype | str,
        trust_remote_code: bool,
    ) -> PreTrainedModel:
        """transformers would start a missing tensor at random, and read a pickle: here both are errors."""
        _refuse_kernels(config, backend)
        try:
            model, info = cls._fallback.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
        except OSError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        missing = [key for key in info["missing_keys"] if not key.startswith(cls._new_heads)]
        if problems := [*missing, *info["mismatched_keys"]]:
            raise CheckpointError(f"{folder} does not fit the model: missing or of another shape: {problems[:8]}")
        return model

    @classmethod
    def registered(cls, config: PreTrainedConfig) -> Any:
        """The registered class for this task; None: transformers' own serves.

        Raises:
            ValueError: the config is of another task.
        """
        return registry.resolve(cls._architecture(config))

    @classmethod
    def _architecture(cls, config: PreTrainedConfig) -> str:
        named = [name for name in config.architectures or () if name.endswith(cls._suffix)]
        architecture = named[0] if named else cls._by_model_type.get(config.model_type)
        if architecture is None:
            raise ValueError(
                f"{cls.__name__}: architectures={config.architectures} with model_type={config.model_type!r} is not "
                f"a model {cls._suffix}"
            )
        return architecture

    @classmethod
    def _resolve(cls, config: PreTrainedConfig) -> Any:
        """As `registered`, and a log line where that is None."""
        if (model_class := cls.registered(config)) is None:
            logger.warning(
                "%s is not among the registered architectures (%s): using transformers' own class, unfused",
                cls._architecture(config),
                ", ".join(registry.architectures()),
            )
        return model_class


def _in_turn(first: Callable[[Any], None], second: Callable[[Any], None] | None) -> Callable[[Any], None]:
    def both(model: Any) -> None:
        first(model)
        if second is not None:
            second(model)

    return both


def _refuse_kernels(config: PreTrainedConfig, backend: BackendConfig) -> None:
    defaults = BackendConfig()
    for name in ("linear", "rms_norm", "rope_fusion"):
        if getattr(backend, name) != getattr(defaults, name):
            raise ValueError(
                f"backend.{name}={getattr(backend, name)!r} has no effect on transformers' own class for "
                f"{config.model_type!r}; leave it out"
            )


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
    _new_heads = ("score.", "classifier.")
