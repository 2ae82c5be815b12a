"""Hugging Face checkpoints in and out of models that hold fused parameters."""

import copy
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from nemo_automodel.components.checkpoint import (
    CheckpointError,
    TensorReader,
    load_parameters,
    open_checkpoint,
    publish_folder,
    write_shards,
)
from nemo_automodel.components.checkpoint.loading import assign, matches, refuse
from nemo_automodel.components.checkpoint.shards import empty_local, with_local
from nemo_automodel.components.models.common.backend import BackendConfig
from nemo_automodel.components.models.common.combined_projection.state_dict_adapter import (
    HEAD,
    OWN_ROWS,
    CombinedProjectionStateDictAdapter,
)
from nemo_automodel.components.models.common.pretrained import (
    default_dtype,
    fetch,
    overridden,
    pop_hub_options,
    read_generation_config,
    resolve_dtype,
    write_configs,
)
from nemo_automodel.components.peft import save_adapter as write_adapter
from nemo_automodel.components.placement import fill, whole
from nemo_automodel.components.together import Together

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)

# Llama checkpoints of 2023 carry RoPE tables, which are always computed from the config here
_ADAPTERS = r"\.lora_"
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$",)
# what modules of Transformer Engine pickle beside their weights, in every state dict they are part of
_EXTRA_STATE = (r"\._extra_state$",)


class HFCheckpointingMixin(_Base):
    """``from_pretrained``, ``save_pretrained`` and ``load_state_dict`` for a model with a ``state_dict_adapter``.

    Inherit it before the model's ``PreTrainedModel`` base. Checkpoints on disk always have Hugging Face's names and
    shapes; the model's own ``state_dict()`` has the fused ones.
    """

    state_dict_adapter: CombinedProjectionStateDictAdapter

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states, and of all parameters but those in float8, with which a pipeline's stage may begin."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point() and p.itemsize > 1)

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, backend: BackendConfig | Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Self:
        """A model with random weights, on torch's current default device, in its default dtype."""
        return cls(config, backend, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: PreTrainedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        backend: BackendConfig | Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        prepare: Callable[[Self], None] | None = None,
        check_finite: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load a Hugging Face checkpoint, in evaluation mode.

        The model is built on the meta device and filled tensor by tensor, so the host holds the weights plus a few
        tensors at most.

        Args:
            pretrained_model_name_or_path: a local folder, or a Hub id where a hub can be reached.
            config: instead of the checkpoint's own.
            dtype: of the parameters: a `torch.dtype`, its name, or None/"auto" for the checkpoint's own.
            torch_dtype: the older name of ``dtype``.
            attn_implementation: ``"eager"``, ``"sdpa"``, ``"flex_attention"`` or any name registered with
                transformers' attention interface; default: what ``backend.attn`` says.
            backend: a `BackendConfig` or its fields as a dict.
            device: where the parameters go.
            prepare: called with the model on the meta device, to add adapters, shard it (``fully_shard``,
                ``parallelize_module``) or leave some of its modules to other ranks; each rank then reads its own
                parts only. Adapters stay NaN until `init_adapters` or their own file sets them.
            check_finite: refuse weights that are NaN or infinite, by name.
            **kwargs: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` for the Hub; any other name must be
                a field of the config, which it overrides.

        Raises:
            CheckpointError: the checkpoint is missing, damaged, or does not fit the config; nothing was built.
            TypeError: an option that is neither known nor a field of the config.
        """
        folder = fetch(pretrained_model_name_or_path, **pop_hub_options(kwargs))
        if config is None:
            assert cls.config_class is not None, f"{cls.__name__} must set config_class"
            config = cls.config_class.from_pretrained(folder)
        config = overridden(config, kwargs)
        quantization = config.__dict__.pop("quantization_config", None)  # a plain model comes of it
        reader = open_checkpoint(folder, quantization, check_finite=check_finite)
        backend = BackendConfig.of(backend).apply_to(config, attn_implementation)
        dtype = resolve_dtype(dtype if dtype is not None else torch_dtype, config, reader)
        if quantization:  # once more, so that weights are rounded once, to what the model holds
            reader = open_checkpoint(folder, quantization, dtype=dtype, check_finite=check_finite)
        with default_dtype(dtype), torch.device("meta"):
            model = cls.from_config(config, backend=backend)
        tied, names = dict(model.all_tied_weights_keys), set(model.state_dict())
        if prepare is not None:
            prepare(model)
        model._fill(reader, dtype, device, tied, names - set(model.state_dict()))
        model.name_or_path = config.name_or_path = str(pretrained_model_name_or_path)
        read_generation_config(model, folder)
        return model.eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> None:
        """Write a plain Hugging Face checkpoint: safetensors with Hugging Face's names, config, generation config.

        A tied head is left out. See `publish_folder` for what a failed or interrupted save leaves behind.

        Args:
            save_directory: the folder; created, or its weights replaced.
            is_main_process: False writes nothing. A sharded model is saved by all ranks together, on a file system
                they share: each calls this, whatever it says here.
            state_dict: own state dict to write instead of the model's.
            max_shard_size: bytes or text such as ``"5GB"``.
            **kwargs: transformers' other options, accepted where they change nothing here.

        Raises:
            TypeError: an option that would change what is written.
            ValueError: adapters in the model, or in the folder, that a plain checkpoint would lose or be changed by.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            state = None if state_dict is None else dict(state_dict)
            super().save_pretrained(save_directory, is_main_process, state, max_shard_size=max_shard_size, **kwargs)
            return
        harmless = {"safe_serialization", "token", "save_peft_format", "save_original_format"}
        if unknown := [name for name, value in kwargs.items() if name not in harmless and value]:
            raise TypeError(f"save_pretrained does not take {unknown[0]!r} (to upload: model.push_to_hub(repo))")
        state = dict(self.state_dict() if state_dict is None else state_dict)
        together = Together(alone=not any(isinstance(tensor, DTensor) for tensor in state.values()))
        if not is_main_process and together.size == 1:
            return
        if (Path(save_directory) / "adapter_config.json").is_file():
            raise ValueError(
                f"{save_directory} holds an adapter, which transformers would put on top of the weights saved beside "
                "it; choose another folder, or move the adapter away"
            )
        if adapters := [name for name in state if ".lora_" in name]:
            raise ValueError(
                f"{adapters[0]}: a plain checkpoint has no place for adapters, and would be the model without them; "
                "fold them in first (merge_lora), or save them alone (save_adapter)"
            )
        for target, source in self.all_tied_weights_keys.items():
            # whether the head is tied is read off the parameters themselves, not off the config
            if self.get_parameter(target) is self.get_parameter(source):
                state.pop(target, None)

        publish_folder(
            save_directory,
            lambda folder: self.write_checkpoint(folder, state.items(), max_shard_size, together),
            together=together,
        )

    def write_checkpoint(
        self,
        folder: Path,
        tensors: Iterable[tuple[str, Tensor]],
        max_shard_size: int | str = "5GB",
        together: Together | None = None,
    ) -> None:
        """Write config, generation config and the weights ``tensors``, of the model's own names, into ``folder``.

        Tensors are taken one at a time, and DTensors gathered; all ranks of ``together`` call this. See `write_shards`.
        """
        together = together or Together(alone=True)
        together.run(lambda: write_configs(self, folder), everywhere=False)
        write_shards(folder, self._hf_tensors(tensors), max_shard_size, together)

    def save_adapter(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the model's adapters in peft's format, for ``PeftModel.from_pretrained(base, save_directory)``.

        Weights that came with a loaded adapter (``modules_to_save``, biases) are written with it. A sharded model is
        saved by all ranks together.

        Raises:
            ValueError: no adapters in the model, or a folder that holds a model.
        """
        if (Path(save_directory) / "config.json").is_file():
            raise ValueError(
                f"{save_directory} holds a model, which transformers would load with the adapter on top; choose "
                "another folder for the adapter"
            )
        together = Together(alone=not any(isinstance(tensor, DTensor) for tensor in self.parameters()))
        publish_folder(
            save_directory,
            lambda folder: write_adapter(self, folder, base_model=self.name_or_path or "", writes=together.leads),
            together=together,
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Own names; marked, so that `load_state_dict` can tell them from a checkpoint's that read the same.

        Tensors alone: no module's ``_extra_state``.
        """
        state = super().state_dict(*args, **kwargs)
        for name in [name for name in state if matches(name, _EXTRA_STATE)]:
            del state[name]
        setattr(state, OWN_ROWS, True)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load own names, or Hugging Face's: the rows of ``q_proj`` and the like go to their place in the fused one.

        Tools that reload a saved folder (transformers' Trainer, for one) pass Hugging Face's names, shard by shard
        with ``strict=False``; without this they would be dropped with a warning. Modules keep the ``_extra_state`` they
        have, whatever is given.

        Raises:
            ValueError: names that are both sides', in a plain dict, so that nobody can tell the order of the rows.
        """
        layout = self.state_dict_adapter.layout
        extra = {name: state for name, state in super().state_dict().items() if matches(name, _EXTRA_STATE)}
        if given := [name for name in state_dict if matches(name, _EXTRA_STATE)]:
            state_dict = copy.copy(state_dict)  # of whatever type, with its marks
            for name in given:
                del state_dict[name]  # type: ignore[attr-defined]
        current = self.state_dict()
        if not any(layout.locate(key).own in current for key in state_dict if key not in current):
            if layout.ambiguous and not hasattr(state_dict, OWN_ROWS):
                raise ValueError(
                    f"checkpoints of {type(self).__name__} name a tensor as the model does, with its rows in another "
                    "order, and this dict does not say whose it is: load a folder with from_pretrained, or pass "
                    "model.state_dict_adapter.from_hf(state_dict), or what state_dict() gave, itself"
                )
            return super().load_state_dict(_joined(state_dict, extra), strict=strict, assign=assign)
        if strict:
            fused = self.state_dict_adapter.from_hf(state_dict)
            if HEAD not in state_dict and HEAD not in current:  # a classifier has no head to tie
                fused.pop(HEAD, None)
            return super().load_state_dict(_joined(fused, extra), strict=True, assign=assign)
        own: dict[str, Tensor] = {}
        absent: list[str] = []
        for key, value in state_dict.items():
            place = layout.locate(key)
            if place.fusion is None or place.own not in current:
                own[place.own if place.own in current else key] = value
                continue
            if place.own not in own:
                own[place.own] = self._rows_to_fill(current[place.own], value)
                absent += [name for name in layout.hf_keys(place.own) if name not in state_dict]
            place.fusion.write_part(own[place.own], place.part, value)
        loaded = super().load_state_dict(_joined(own, extra), strict=False, assign=assign)
        loaded.missing_keys.extend(absent)
        return loaded

    @staticmethod
    def _rows_to_fill(current: Tensor, like: Tensor) -> Tensor:
        """A fused tensor whose absent parts keep the values they have; NaN where they have none yet."""
        if current.is_meta:
            return torch.full(current.shape, float("nan"), dtype=current.dtype, device=like.device)
        return current.clone()

    def _fill(
        self,
        reader: TensorReader,
        dtype: torch.dtype,
        device: torch.device | str,
        tied: Mapping[str, str],
        elsewhere: Set[str],
    ) -> None:
        """Weights, buffers, and what is in no checkpoint.

        Args:
            reader: the checkpoint.
            dtype: of the weights.
            device: where they go.
            tied: target -> source before ``prepare``.
            elsewhere: names that ``prepare`` left to other ranks.
        """
        if elsewhere:
            _refuse_unlike_ties(self, reader, tied, elsewhere)
        if _overrides(self.state_dict_adapter, "from_hf"):
            if elsewhere:
                raise ValueError(
                    f"{type(self.state_dict_adapter).__name__} overrides from_hf, which takes whole models: mesh.pp=1"
                )
            missing = self._fill_through_from_hf(reader, dtype, device, tied)
        else:
            missing = load_parameters(
                self,
                reader,
                self.state_dict_adapter.layout,
                dtype=dtype,
                device=device,
                tied=tied,
                may_miss=(*(self._keys_to_ignore_on_load_missing or ()), _ADAPTERS),
                may_ignore=self._may_ignore(),
                elsewhere=elsewhere,
            )
        self.tie_weights(missing_keys=missing, recompute_mapping=False)
        untied = dict(tied.items() - self.all_tied_weights_keys.items())  # by `prepare`: both start with one value
        untied |= {source: target for target, source in untied.items()}
        for name, tensor in self.state_dict(keep_vars=True).items():
            if not tensor.is_meta:
                continue
            assign(self, name, with_local(tensor, empty_local(tensor, tensor.dtype, device).fill_(float("nan"))))
            if name in untied:
                fill(self.get_parameter(name), whole(self.get_parameter(untied[name])))
            elif not matches(name, [_ADAPTERS]):
                self._init_weights(self.get_submodule(name.rpartition(".")[0]))
                logger.warning("%s is not in %s: initialized at random, to be trained", name, reader.path)
        self._rebuild_buffers(device)

    def _may_ignore(self) -> tuple[str, ...]:
        return (*(self._keys_to_ignore_on_load_unexpected or ()), *_OLD_BUFFERS, *_EXTRA_STATE)

    def _fill_through_from_hf(
        self, reader: TensorReader, dtype: torch.dtype, device: torch.device | str, tied: Mapping[str, str]
    ) -> set[str]:
        """For adapters that override ``from_hf``: the whole state dict passes through it at once."""
        own = self.state_dict(keep_vars=True)
        try:
            state = self.state_dict_adapter.from_hf({key: reader.read(key) for key in reader})
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{reader.path} does not fit the model: {error.args[0]}") from error
        state = {key: value for key, value in state.items() if key in own or not matches(key, self._may_ignore())}
        problems = [f"{key}: not used by this model" for key in state if key not in own]
        problems += [
            f"{key}: shape {list(value.shape)} where the config asks for {list(own[key].shape)}"
            for key, value in state.items()
            if key in own and value.shape != own[key].shape
        ]
        missing = {key for key in own if key not in state}
        excused = {target for target, source in tied.items() if source in state}
        excused |= {key for key in missing if matches(key, self._keys_to_ignore_on_load_missing or ())}
        problems += [f"{key}: missing" for key in sorted(missing - excused)]
        refuse(reader, problems)
        for key, value in state.items():
            assign(self, key, value.to(device, dtype if value.is_floating_point() else value.dtype))
        return missing

    def _rebuild_buffers(self, device: torch.device | str) -> None:
        """Buffers that no checkpoint holds (RoPE tables) are computed again where they were built on meta."""
        for name, module in self.named_modules():
            buffers = dict(module.named_buffers(recurse=False))
            if computed := {leaf: buffer for leaf, buffer in buffers.items() if buffer.is_meta}:
                for leaf, buffer in computed.items():
                    module._buffers[leaf] = torch.full_like(buffer, float("nan"), device=device)
                self._init_weights(module)
                if unset := [leaf for leaf in computed if module._buffers[leaf].isnan().any()]:
                    raise RuntimeError(
                        f"{name}.{unset[0]} is a buffer that neither the checkpoint nor {type(self).__name__}."
                        "_init_weights sets: set it there"
                    )
            elif buffers:
                module.to(device)

    def _hf_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        # gathered here, once: the parts of a sharded fused tensor would be sharded and gathered again
        gathered = ((own, whole(tensor)) for own, tensor in tensors)
        try:
            if _overrides(self.state_dict_adapter, "to_hf"):
                yield from self.state_dict_adapter.to_hf(dict(gathered)).items()
                return
            for own, tensor in gathered:
                yield from self.state_dict_adapter.to_hf({own: tensor}).items()
        except Exception:
            deque(gathered, maxlen=0)  # with the other ranks, which would wait for this one for ever
            raise


def _refuse_unlike_ties(
    model: HFCheckpointingMixin, reader: TensorReader, tied: Mapping[str, str], elsewhere: Set[str]
) -> None:
    """Which of two tied parameters on two pipeline stages counts, no stage could know: in one process both would."""
    layout = model.state_dict_adapter.layout
    for pair in tied.items():
        keys = [key for name in pair for key in layout.hf_keys(name) if key in set(reader)]
        if elsewhere & set(pair) and len(keys) > 1 and not torch.equal(*map(reader.read, keys)):
            raise CheckpointError(
                f"{reader.path}: its config ties {keys[0]} and {keys[1]}, which differ, so they are not trained in "
                "pipeline stages: set tie_word_embeddings=false in its config.json, or leave mesh.pp at 1"
            )


def _joined(state: Mapping[str, Any], more: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**state, **more} if more else state  # itself: torch marks what its modules' versions were


def _overrides(adapter: Any, method: str) -> bool:
    return getattr(type(adapter), method) is not getattr(CombinedProjectionStateDictAdapter, method)
