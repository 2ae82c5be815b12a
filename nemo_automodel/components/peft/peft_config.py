"""``adapter_config.json``: which of peft's options are honoured, and a refusal by name for every other one."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_automodel.components.peft.config import ALL_LINEAR, Update, by_pattern

# what they say is read below
_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "init_lora_weights", "ensure_weight_tying",
}  # fmt: skip
# provenance, and how the adapter was started or trained: neither the forward pass nor the tensors depend on them
_HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "runtime_config", "velora_config",
}  # fmt: skip
_WAYS_OUT = {
    "fan_in_fan_out": "it is for layers that store weights transposed, which this model has none of; set it to false",
    "lora_bias": "biases on B have no place in a fused projection; merge the adapter with peft (merge_and_unload)",
    "layer_replication": "build the replicated model with peft, save it merged (merge_and_unload), load that",
    "trainable_token_indices": "merge the adapter with peft (merge_and_unload), or train embed_tokens whole "
    "(modules_to_save)",
    "alora_invocation_tokens": "activated LoRA acts on some tokens only; serve it with peft",
    "megatron_config": "export the adapter from Megatron to plain layers first",
}
_MERGE = "merge the adapter with peft (merge_and_unload) and load the merged model"
# other ways to start change the base weights too, so the adapter belongs to another model than its folder says
_INITS = {True, False, "true", "false", "gaussian", "eva", "orthogonal", "mica", None}


@dataclass(frozen=True)
class PeftConfig:
    """The options of an adapter that matter here, as peft's ``LoraConfig`` has them.

    Attributes:
        path: the file.
        fields: what it says.
    """

    path: Path
    fields: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "PeftConfig":
        """The config in the file ``path``.

        Raises:
            ValueError: no such file, not a JSON object, or an option that cannot be honoured, by its name.
        """
        if not path.is_file():
            raise ValueError(f"{path} does not exist: an adapter folder in peft's format has it")
        try:
            fields = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{path} holds {type(fields).__name__}, not an object")
        config = cls(path, fields)
        config._refuse_what_cannot_be_honoured()
        return config

    @property
    def dora(self) -> bool:
        """Whether rows have trained magnitudes."""
        return bool(self.fields.get("use_dora"))

    @property
    def dropout(self) -> float:
        """Dropout on the adapters' input."""
        return float(self.fields.get("lora_dropout") or 0.0)

    @property
    def bias(self) -> str:
        """``"none"``, ``"all"`` or ``"lora_only"``: which biases come with the adapter."""
        return self.fields.get("bias") or "none"

    @property
    def modules_to_save(self) -> list[str]:
        """Ends of the paths of modules that come whole with the adapter."""
        return list(self.fields.get("modules_to_save") or [])

    def update(self, path: str) -> Update:
        """Rank and scale of the projection at Hugging Face's ``path``."""
        fields = self.fields
        r = by_pattern(fields.get("rank_pattern") or {}, path, fields.get("r", 8))
        alpha = by_pattern(fields.get("alpha_pattern") or {}, path, fields.get("lora_alpha", 8))
        return Update(r, alpha, bool(fields.get("use_rslora")))

    def saves(self, path: str) -> bool:
        """Whether ``modules_to_save`` takes the module ``path`` or one it lies in; peft compares bare ends of paths."""
        names = path.split(".")
        paths = [".".join(names[: i + 1]) for i in range(len(names))]
        return any(path.endswith(module) for path in paths for module in self.modules_to_save)

    def targets(self, path: str) -> bool | None:
        """Whether peft would adapt the projection ``path``; None where the file leaves that to peft's defaults."""
        wanted, excluded = self.fields.get("target_modules"), self.fields.get("exclude_modules")
        if wanted is None or wanted == ALL_LINEAR:
            return None
        if excluded and (re.fullmatch(excluded, path) if isinstance(excluded, str) else _ends(path, excluded)):
            return False
        if any(re.match(rf"(^|.*\.){module}($|\..*)", path) for module in self.modules_to_save):
            return False
        if isinstance(wanted, str):
            return re.fullmatch(wanted, path) is not None
        return path in wanted or (_ends(path, wanted) and self._in_chosen_layers(path))

    def _in_chosen_layers(self, path: str) -> bool:
        layers, patterns = self.fields.get("layers_to_transform"), self.fields.get("layers_pattern")
        if layers is None or layers == []:
            return True
        patterns = [patterns] if isinstance(patterns, str) and patterns else patterns or [r"[^.]*"]
        found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path) for pattern in patterns)
        index = next((int(match[1]) for match in found if match), None)
        return index in (layers if isinstance(layers, list) else [layers])

    def _refuse_what_cannot_be_honoured(self) -> None:
        if (kind := self.fields.get("peft_type")) != "LORA":
            raise ValueError(f"{self.path}: peft_type={kind!r}: only LORA adapters (DoRA included) are read; {_MERGE}")
        init = self.fields.get("init_lora_weights", True)
        if (init.lower() if isinstance(init, str) else init) not in _INITS:
            raise ValueError(
                f"{self.path}: init_lora_weights={init!r} starts by changing the base weights, which the adapter does "
                "not hold; save it from peft with path_initial_model_for_weight_conversion (which makes it a plain "
                f"LoRA), or {_MERGE}"
            )
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"{self.path}: bias={self.bias!r} is none of none, all, lora_only")
        for name, value in self.fields.items():
            if name in _READ or name in _HARMLESS or not value:
                continue
            known = _WAYS_OUT.get(name)
            raise ValueError(f"{self.path}: {name}={value!r} cannot be honoured here; {known or _MERGE}")
        for name, value in (self.fields.get("rank_pattern", None) and self.fields["rank_pattern"].items()) or ():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.path}: rank_pattern: {name!r}: {value!r} must be a whole number above zero")


def _ends(path: str, names: list[str]) -> bool:
    return path in names or any(path.endswith(f".{name}") for name in names)
