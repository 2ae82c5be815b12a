"""What is to be verified: an implementation, its reference and a config, from whatever the user names."""

import copy
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig

from nemo_automodel._transformers import registry
from nemo_automodel.components.checkpoint import CheckpointError, SafetensorsReader
from nemo_automodel.components.checkpoint.reading import INDEX, SINGLE
from nemo_automodel.verify.shrink import shrunk

_OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.pth", "*.gguf", "*.h5", "*.msgpack")


class TargetError(ValueError):
    """The target is nothing that can be verified; the message says what would be."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """An implementation and what it is measured against.

    Attributes:
        name: what the user called it.
        model_class: the implementation.
        reference_class: usually transformers' class of the same architecture.
        config: the config as given.
        tiny: a small config with the same features, which most checks run on.
        checkpoint: folder of the real weights, None where there are none.
        unread: why weights that the folder does hold are not verified.
        changed: what `tiny` changed, ``"field: old -> new"``.
    """

    name: str
    model_class: Any
    reference_class: Any
    config: PreTrainedConfig
    tiny: PreTrainedConfig
    checkpoint: Path | None = None
    unread: str = ""
    changed: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model_class: Any,
        config: PreTrainedConfig,
        *,
        reference: str | type | None = None,
        name: str | None = None,
        checkpoint: Path | None = None,
        unread: str = "",
    ) -> "Target":
        """An implementation at hand, for ``config``.

        Args:
            model_class: the class to verify.
            config: for it; the checks run on a small one with its features.
            reference: a class or its name; default: transformers' of the config's architecture.
            name: in reports; default: the class's.
            checkpoint: folder of real weights.
            unread: why other weights, which are there, are not verified.

        Raises:
            TargetError: no reference for it, not a causal language model, or a config that the reference refuses.
        """
        twin = reference if isinstance(reference, type) else _reference_class(reference, config, model_class)
        if not twin.__name__.endswith("ForCausalLM"):
            raise TargetError(f"{twin.__name__}: only causal language models are verified")
        _refuse_unusable(twin, config)
        try:
            tiny, changed = shrunk(config)
        except Exception as error:  # of the config class too, which checks what it is given
            raise TargetError(f"the config cannot be made small for the checks: {_said(error)}") from error
        return cls(
            name=name or model_class.__name__,
            model_class=model_class,
            reference_class=twin,
            config=config,
            tiny=tiny,
            checkpoint=checkpoint,
            unread=unread,
            changed=tuple(changed),
        )


def find_target(target: str | Path, config: str | Path | None = None, reference: str | None = None) -> Target:
    """What ``target`` names: a checkpoint folder, a ``config.json``, a registered architecture, or a ``model.py``.

    Weights in the folder that the config comes from are verified too.

    Args:
        target: a folder with ``config.json``, the path of a config file, an architecture such as
            ``"LlamaForCausalLM"``, a Python file with a ``ModelClass``, or a folder with such a ``model.py``.
        config: the config file or folder for an architecture or a ``model.py``. Default for an architecture: that of
            its config class, as it stands.
        reference: ``"transformers.LlamaForCausalLM"``, ``"package.module.Class"`` or ``"Class"`` of transformers;
            default: transformers' class of the config's architecture.

    Raises:
        TargetError: there is no such thing, no implementation of it, no reference for it, or no model of its config.
    """
    path = Path(target)
    if path.is_dir() and (path / "model.py").is_file() and not (path / "__init__.py").is_file():
        path, config = path / "model.py", config if config is not None else path
    if path.suffix == ".py":
        by_hand = model_class_of(path)
        if config is None:
            raise TargetError(f"{path}: a model.py needs --config, a config.json or a folder with one")
        return _of_folder(by_hand, Path(config), reference, str(target))
    if path.is_dir() or path.suffix == ".json":
        if config is not None:
            raise TargetError(f"{path} has its own config; --config goes with an architecture or a model.py")
        return _of_folder(None, path, reference, str(target))
    architecture = str(target)
    model_class: Any = registry.resolve(architecture)
    if model_class is None:
        hint = " (`automodel new` starts an implementation)" if hasattr(transformers, architecture) else ""
        raise TargetError(
            f"{architecture} is no folder, no file and no registered architecture: {', '.join(_causal())}{hint}"
        )
    if config is not None:
        return _of_folder(model_class, Path(config), reference, architecture)
    return Target.of(model_class, _grouped(model_class.config_class()), reference=reference, name=architecture)


def _of_folder(model_class: Any, path: Path, reference: str | None, name: str) -> Target:
    """``model_class``, default the registered one, for the config and the weights at ``path``."""
    config = _read_config(path)
    checkpoint, unread = _weights(path) if path.is_dir() else (None, "")
    return Target.of(
        model_class or _registered(config, path),
        config,
        reference=reference,
        name=name,
        checkpoint=checkpoint,
        unread=unread,
    )


def _weights(folder: Path) -> tuple[Path | None, str]:
    """``folder`` where it holds a checkpoint; else None, and why weights that it holds in another form are not read."""
    if any(os.path.lexists(folder / name) for name in (SINGLE, INDEX)):
        return folder, ""
    others = sorted(file.name for pattern in _OTHER_WEIGHTS for file in folder.glob(pattern))
    if others:
        try:
            SafetensorsReader(folder)
        except CheckpointError as reason:
            return None, f"{others[0]} is not verified: {reason}"
    return None, ""


def _grouped(config: PreTrainedConfig) -> PreTrainedConfig:
    """Config classes start from the first checkpoint of their family, whose heads often share nothing."""
    if getattr(config, "num_key_value_heads", None) == config.num_attention_heads:
        config.num_key_value_heads = max(1, config.num_attention_heads // 4)
    return config


def _read_config(path: Path) -> PreTrainedConfig:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise TargetError(f"{file} does not exist")
    try:
        return AutoConfig.from_pretrained(file)
    except Exception as error:  # config classes raise what they like, and it is the file's fault
        raise TargetError(f"{file}: transformers cannot read it: {_said(error)}") from error


def _refuse_unusable(reference_class: Any, config: PreTrainedConfig) -> None:
    """Else the checks would find fault with the implementation; or with nothing, where the small config is right.

    Raises:
        TargetError: the reference cannot be built, or not be run.
    """
    try:
        with torch.device("meta"):
            reference_class(copy.deepcopy(config))
    except Exception as error:
        raise TargetError(f"{reference_class.__name__}, the reference, refuses the config: {_said(error)}") from error
    heads, kv_heads = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if heads and kv_heads and heads % kv_heads:  # shows in a forward pass only, and not in a small config's
        raise TargetError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _registered(config: PreTrainedConfig, path: Path) -> Any:
    named = [name for name in config.architectures or () if name.endswith("ForCausalLM")]
    architecture = named[0] if named else _architecture_of(config)
    if architecture is None or (model_class := registry.resolve(architecture)) is None:
        raise TargetError(
            f"{path}: {architecture or config.model_type!r} is not registered ({', '.join(_causal())}); "
            "`automodel new` starts an implementation, `automodel verify model.py --config ...` verifies one by hand"
        )
    return model_class


def _reference_class(reference: str | None, config: PreTrainedConfig, model_class: Any) -> Any:
    if reference is not None:
        module, _, name = reference.rpartition(".")
        try:
            return getattr(importlib.import_module(module or "transformers"), name)
        except (ImportError, AttributeError) as error:
            raise TargetError(f"--reference {reference}: {error}") from error
    candidates = (*(config.architectures or ()), model_class.__name__, _architecture_of(config))
    for candidate in candidates:
        name = candidate or ""
        if name.endswith("ForCausalLM") and (found := getattr(transformers, name, None)) is not None:
            return found
    raise TargetError(
        f"{model_class.__name__}: transformers has no class of that name, nor one for {config.model_type!r}; name "
        "the reference, such as --reference transformers.LlamaForCausalLM"
    )


def _architecture_of(config: PreTrainedConfig) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)


def model_class_of(path: Path) -> Any:
    """The ``ModelClass`` of a ``model.py``.

    Raises:
        TargetError: it has none, or cannot be imported.
    """
    if not path.is_file():
        raise TargetError(f"{path} does not exist")
    # a package's relative and absolute imports work when its folder can be found
    name = f"verified_{path.parent.name}_{path.stem}".replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _own_registry():
            spec.loader.exec_module(module)
    except Exception as error:
        raise TargetError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, "ModelClass"):
        raise TargetError(f"{path} has no ModelClass: name the causal-LM class so at the end of the file")
    return module.ModelClass


@contextmanager
def _own_registry() -> Iterator[None]:
    """What a file registers when it is imported is forgotten: it may be imported again, or have been before."""
    known, registered = dict(registry.MODEL_ARCH_MAPPING), registry.MODEL_ARCH_MAPPING
    for name in [name for name, (module, *_) in known.items() if not module.startswith("nemo_automodel.")]:
        del registered[name]
    try:
        yield
    finally:
        registered.clear()
        registered.update(known)


def _causal() -> list[str]:
    return [name for name in registry.architectures() if name.endswith("ForCausalLM")]
