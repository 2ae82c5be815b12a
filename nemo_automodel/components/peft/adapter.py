"""An adapter that peft trained on the unfused model, checked whole against the fused one and loaded into it."""

import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nemo_automodel.components.layout import Layout
from nemo_automodel.components.peft.files import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Replaced,
    adapter_tensors,
    layout_of,
    own_rows,
    refuse,
)
from nemo_automodel.components.peft.model import adapted_layer, leaf, part_paths, refuse_adapters, untie
from nemo_automodel.components.peft.peft_config import PeftConfig
from nemo_automodel.components.placement import fill, whole

# peft writes the magnitude without ".weight" and reads it with as well
_KEY = re.compile(r"^(?P<path>.+)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector)(?P<weight>\.weight)?$")
_BASE_BIAS, _BASE_WEIGHT = ".base_layer.bias", ".base_layer.weight"
_WAYS_OUT = {
    ".lora_embedding_": "LoRA on an embedding; train it whole (modules_to_save), or merge the adapter with peft "
    "(merge_and_unload)",
    ".lora_B.bias": "a bias on B (lora_bias); merge the adapter with peft (merge_and_unload)",
    ".token_adapter.": "trained tokens (trainable_token_indices); merge the adapter with peft (merge_and_unload)",
}


@dataclass
class PeftAdapter:
    """What an adapter folder holds. First `prepare` the model (weights may still be on meta), then `load` them.

    Attributes:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        config: peft's options.
        tensors: as in the file, without peft's prefix; all on the CPU.
    """

    folder: Path
    config: PeftConfig
    tensors: dict[str, Tensor]
    _layout: Layout = field(default_factory=lambda: Layout(()))
    _replaced: dict[str, str] = field(default_factory=dict)
    _copies: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "PeftAdapter":
        """The adapter in ``folder``, a local one.

        Raises:
            ValueError: a file that is missing or damaged, or an option of peft that cannot be honoured, by its name.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"adapter {folder}: no such folder (one of the Hub has to be fetched first)")
        config = PeftConfig.read(folder / CONFIG)
        file = folder / WEIGHTS
        if not file.is_file():
            other = folder / "adapter_model.bin"
            hint = f"; {other.name} is a pickle: save it again with peft's save_pretrained" if other.exists() else ""
            raise ValueError(f"{file} does not exist{hint}")
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        refuse(
            f"{file} is no adapter of a whole model",
            [f"{key}: peft's names start with {PREFIX}" for key in tensors if not key.startswith(PREFIX)],
        )
        return cls(folder, config, {key.removeprefix(PREFIX): value for key, value in tensors.items()})

    def prepare(self, model: nn.Module, layout: Layout | None = None) -> None:
        """Freeze ``model`` and put empty adapters where this one's tensors go; nothing changes when it does not fit.

        Adapters get the wider dtype of the file's and the layer's (peft, unless told otherwise, computes bf16 ones in
        fp32). A tied head or embedding that comes with the adapter is untied.

        Args:
            model: with weights or on the meta device, not sharded yet.
            layout: the model's table of fused projections (default: its ``state_dict_adapter``'s).

        Raises:
            ValueError: every tensor that has no place or another shape, every one that is missing; or a model that has
                adapters.
        """
        refuse_adapters(model)
        self._layout = layout or layout_of(model)
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        homes = {path: name for name in linears for path in part_paths(name, self._layout)}
        adapted, self._replaced, problems = self._sorted(model, set(homes))
        problems += self._missing(model, set(homes), adapted)
        for path, kinds in adapted.items():
            if path in homes:
                problems += self._shapes(path, kinds, linears[homes[path]])
        refuse(f"{self.folder} does not fit the model", problems)

        by_layer: dict[str, list[str]] = defaultdict(list)
        for path in adapted:
            by_layer[homes[path]].append(path)
        model.requires_grad_(False)
        for name in self._replaced.values():
            untie(model, self._layout.locate(name).own)
        for name, paths in by_layer.items():
            dtype = linears[name].weight.dtype
            for path in paths:
                for key in adapted[path].values():
                    dtype = torch.promote_types(dtype, self.tensors[key].dtype)
            layer = adapted_layer(
                linears[name],
                name,
                {leaf(path): self.config.update(path) for path in paths},
                self._layout,
                dropout=self.config.dropout,
                dora=self.config.dora,
                dtype=dtype,
            )
            model.set_submodule(name, layer.train(linears[name].training))

    @torch.no_grad()
    def load(self, model: nn.Module) -> None:
        """Fill the adapters of a model that `prepare` prepared, and overwrite what comes with them.

        Biases and ``modules_to_save`` take the place of the model's own. Parameters may be sharded: every rank calls
        this then.

        Raises:
            ValueError: weights on the meta device, or a copy of a base weight in the file (peft adds those of an
                adapted head) that is not the model's own.
        """
        for key in self._copies:
            own = whole(model.get_parameter(key.replace(_BASE_WEIGHT, ".weight")))
            if not torch.equal(self.tensors[key].to(own), own):
                raise ValueError(
                    f"{self.folder / WEIGHTS}: {key} is not the model's own weight, so the adapter was trained on "
                    "another base; load it with that one, or merge it with peft (merge_and_unload)"
                )
        values = {PREFIX + key.removesuffix(".weight"): value for key, value in self.tensors.items()}
        adapters = adapter_tensors(model)
        ordered = own_rows(model, {key: values[key.removesuffix(".weight")] for key in adapters}, self._layout)
        for key, adapter in adapters.items():
            fill(adapter, ordered[key])
        for key, name in self._replaced.items():
            place = self._layout.locate(name)
            parameter = model.get_parameter(place.own)
            value = self.tensors[key]
            if place.fusion:
                value = whole(parameter).clone()
                place.fusion.write_part(value, place.part, self.tensors[key])
            fill(parameter, value)
        if self._replaced:
            saved = self.config.modules_to_save or None
            model._replaced_by_adapter = Replaced(self.config.bias, saved, self._replaced)  # type: ignore[assignment]

    def _sorted(
        self, model: nn.Module, linears: set[str]
    ) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
        """The tensors' keys, sorted: path -> kind -> key of adapters; key -> name of what is replaced; problems."""
        names = self._hf_names(model)
        adapted: dict[str, dict[str, str]] = defaultdict(dict)
        replaced, problems, self._copies = {}, [], []
        for key in self.tensors:
            match = _KEY.match(key)
            if known := next((way for mark, way in _WAYS_OUT.items() if mark in f"{key}."), None):
                problems.append(f"{key}: {known}")
            elif match and (match["weight"] or match["kind"] == "lora_magnitude_vector"):
                adapted[match["path"]][match["kind"]] = key
            elif key.endswith(_BASE_BIAS) and (name := f"{key.removesuffix(_BASE_BIAS)}.bias") in names:
                replaced[key] = name
            elif key.endswith(_BASE_WEIGHT) and key.replace(_BASE_WEIGHT, ".weight") in names:
                self._copies.append(key)
            elif key in names and (self.config.saves(key.rpartition(".")[0]) or self._is_bias_of_all(key)):
                replaced[key] = key
            elif key in names:
                problems.append(
                    f"{key}: a weight of the base model that {CONFIG} does not list in modules_to_save; list it there "
                    "(to use it), or save the adapter again with save_embedding_layers=False"
                )
            else:
                problems.append(f"{key}: not used by this model")
        for key, name in replaced.items():
            if key.endswith(_BASE_BIAS) and (self.config.bias == "none" or name.rpartition(".")[0] not in adapted):
                problems.append(f"{key}: a trained bias, but {CONFIG} says bias={self.config.bias!r}")
            elif key == name and name.rpartition(".")[0] in adapted:
                problems.append(f"{key}: peft keeps an adapted layer's own tensors under 'base_layer'")
            elif (shape := tuple(self.tensors[key].shape)) != (wanted := names[name]):
                problems.append(f"{key}: shape {list(shape)}, where the model has {list(wanted)}")
        for key in self._copies:
            path = key.removesuffix(_BASE_WEIGHT)
            if path not in adapted or self._layout.locate(path).fusion:
                problems.append(f"{key}: not used by this model")
        for path in adapted.keys() - linears:
            if self._layout.fusion_of(path):
                problems.append(
                    f"{path}: an adapter trained on fused projections, not on Hugging Face's; merge it where it was "
                    "trained (merge_and_unload)"
                )
            else:
                problems.append(f"{path}: the model has no such linear layer")
        return adapted, replaced, sorted(problems)

    def _missing(self, model: nn.Module, linears: set[str], adapted: dict[str, dict[str, str]]) -> list[str]:
        """What the config promises and the file lacks, or the other way round."""
        problems = []
        kinds = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if self.config.dora else set())
        for path, found in adapted.items():
            problems += [f"{path}.{kind}: missing" for kind in sorted(kinds - found.keys())]
            if "lora_magnitude_vector" in found.keys() - kinds:
                problems.append(f"{found['lora_magnitude_vector']}: a DoRA magnitude, but {CONFIG} says use_dora false")
            if self.config.saves(path):
                problems.append(f"{path}: has an adapter and is in modules_to_save; peft takes one of the two")
            elif self.config.targets(path) is False:
                problems.append(f"{path}: has an adapter, but {CONFIG} does not target it, so peft would not use it")
        absent = sorted(path for path in linears - adapted.keys() if self.config.targets(path))
        problems += [f"{path}: {CONFIG} targets it, but it has no adapter in {WEIGHTS}" for path in absent]
        if not adapted and not problems:
            problems.append(f"{WEIGHTS} adapts no layer")

        present = set(self._replaced.values())
        names = self._hf_names(model)
        saved = {name for name in names if self.config.saves(name.rpartition(".")[0])}
        if self.config.bias != "none":
            biases = {name for name in names if name.endswith(".bias")}
            saved |= {b for b in biases if self.config.bias == "all" or b.removesuffix(".bias") in adapted}
        problems += [f"{name}: missing (modules_to_save or bias promises it)" for name in sorted(saved - present)]
        if self.config.fields.get("ensure_weight_tying") and any(self._tied(model, name) for name in saved):
            problems.append(
                "ensure_weight_tying=True with a tied module in modules_to_save: merge the adapter with peft "
                "(merge_and_unload)"
            )
        return problems

    def _shapes(self, path: str, kinds: dict[str, str], linear: nn.Linear) -> list[str]:
        if not {"lora_A", "lora_B"} <= kinds.keys():
            return []
        fusion, r = self._layout.locate(path).fusion, self.config.update(path).r
        rows = fusion.part_shape((linear.out_features,), leaf(path))[0] if fusion else linear.out_features
        wanted = {"lora_A": (r, linear.in_features), "lora_B": (rows, r), "lora_magnitude_vector": (rows,)}
        return [
            f"{key}: shape {list(self.tensors[key].shape)}, where the model and rank {r} (of {CONFIG}) take "
            f"{list(wanted[kind])}"
            for kind, key in kinds.items()
            if tuple(self.tensors[key].shape) != wanted[kind]
        ]

    def _is_bias_of_all(self, key: str) -> bool:
        return key.endswith(".bias") and self.config.bias == "all"

    def _hf_names(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Hugging Face's parameter names -> shapes, tied ones under each of their names."""
        names = {}
        for own, parameter in model.named_parameters(remove_duplicate=False):
            for name, place in self._layout.hf_keys(own).items():
                shape = tuple(parameter.shape)
                names[name] = place.fusion.part_shape(shape, place.part) if place.fusion else shape
        return names

    def _tied(self, model: nn.Module, name: str) -> bool:
        named = list(model.named_parameters(remove_duplicate=False))
        parameter = dict(named).get(self._layout.locate(name).own)
        return sum(value is parameter for _, value in named) > 1
