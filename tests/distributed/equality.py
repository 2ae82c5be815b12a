"""Three optimizer steps on a mesh beside the same ones in one process: losses, gradients, parameters, exports."""

from collections.abc import Mapping
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nemo_automodel.components import distributed
from nemo_automodel.components.checkpoint import SafetensorsReader
from nemo_automodel.components.distributed import tensor
from nemo_automodel.components.optim import MasterAdamW
from nemo_automodel.components.optim import adamw as optim
from nemo_automodel.components.placement import whole
from nemo_automodel.components.together import Together
from nemo_automodel.config import load_config
from nemo_automodel.recipes import step
from nemo_automodel.recipes.train import Run, TrainConfig, train
from tests.conftest import randomize
from tests.distributed.ranks import run_ranks
from tests.recipes.conftest import write_checkpoint, write_rows

TOLERANCE = 1e-5
"""In fp32, where sums of other orders differ by 1e-7 of values of about one."""

SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "bos_token_id": None,
}
"""Head dim unlike hidden / heads, groups of two, and (with the tokenizer's) an odd vocabulary."""


FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"pad_token_id": 0, "head_dim": 6}),  # queries, keys, values in one tensor
}


def write_model(folder: Path, family: str, tied: bool) -> Path:
    """A tiny model of the family with its tokenizer."""
    write_checkpoint(folder)
    vocabulary = LlamaConfig.from_pretrained(folder).vocab_size
    shape = SHAPE | {"vocab_size": vocabulary + 1 - vocabulary % 2, "tie_word_embeddings": tied}
    config, model, more = FAMILIES[family]
    torch.manual_seed(0)
    randomize(model(config(**shape | more))).save_pretrained(folder)
    return folder


def words_of(values: Mapping[str, Any]) -> list[str]:
    """Command-line overrides."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def options_of(folder: Path, family: str, tied: bool, **more: Any) -> dict[str, Any]:
    """A training of a tiny model, written to ``folder``: conversations of unequal length, so unequally many tokens."""
    model = folder / f"{family}-{tied}"
    rows = folder / "rows.jsonl"
    if not model.exists():
        write_model(model, family, tied)
    if not rows.exists():
        write_rows(rows, 22)
    return {
        "model.path": model,
        "data.train": rows,
        "data.shuffle": "true",
        "train.device": "cpu",
        "train.batch_size": 8,
        "train.micro_batch_size": 2,
        "train.max_steps": 3,
        "train.async_save": "false",
        "optim.lr": "1e-3",
        "optim.eps": "1e-4",  # else rounding of gradients near zero is a share of lr
        **{name.replace("__", "."): value for name, value in more.items()},
    }


def _no_terms(patch: pytest.MonkeyPatch) -> None:
    """A whole parameter's gradient is taken from one rank's tokens alone."""
    patch.setattr(tensor, "TERM", tensor.WHOLE)


def _loss_of_each_rank(patch: pytest.MonkeyPatch) -> None:
    """Each rank divides by its own valid tokens."""
    patch.setattr(step, "Together", lambda: Together(alone=True))


def _half_the_norm(patch: pytest.MonkeyPatch) -> None:
    """Whole copies count once for each rank."""
    patch.setattr(optim, "_shards", lambda tensor: 1)


def _ties_apart(patch: pytest.MonkeyPatch) -> None:
    """The embedding and the head, on two stages, each learn from their own gradient."""
    patch.setattr(distributed.Pipeline, "shared", property(lambda self: {}, lambda self, value: None), raising=False)


def _without_inductor(patch: pytest.MonkeyPatch) -> None:
    """No rule, but minutes less: layers are captured and differentiated as ever, and not compiled for this CPU."""
    patch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))


SABOTAGE = {
    each.__name__: each for each in (_no_terms, _loss_of_each_rank, _half_the_norm, _ties_apart, _without_inductor)
}
"""Rules of sharding, broken."""


def record(words: list[str], out: Path, sabotage: str = "") -> None:
    """Train; each rank writes what it has of the gradients of every step, and the losses."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    out.mkdir(parents=True, exist_ok=True)
    recorded: dict[str, Tensor] = {}
    numbers = iter(range(100))

    def spy(self: MasterAdamW, gradients: Mapping[str, Tensor]) -> Tensor:
        norm = total_norm(self, gradients)
        number = next(numbers)
        for name, gradient in gradients.items():
            recorded[f"gradient {number} of {name}"] = whole(gradient).clone()
        recorded[f"norm {number}"] = norm.clone()
        return norm

    def finish(self: Run) -> Any:
        for name, parameter in self.optimizer.parameters.items():
            recorded[f"{name} after {self.total_steps} steps"] = whole(parameter).clone()
        recorded["loss"] = torch.tensor(self.loss)
        save_file({k: v.contiguous() for k, v in recorded.items()}, out / f"{rank}.safetensors")
        return end(self)

    total_norm, end = MasterAdamW._total_norm, Run.finish
    with pytest.MonkeyPatch.context() as patch:
        if sabotage:
            SABOTAGE[sabotage](patch)
        patch.setattr(MasterAdamW, "_total_norm", spy)
        patch.setattr(Run, "finish", finish)
        train(load_config(TrainConfig, None, words), say=lambda line: None)


def export_untrained(words: list[str]) -> None:
    """Load a model on the mesh and write it again."""
    run = Run(load_config(TrainConfig, None, words), say=lambda line: None)
    run.save(0)
    run.export()


def differences(one: Path, several: Path) -> dict[str, float]:
    """Largest difference of each tensor that any rank recorded, over one or more; all of one process's are there."""
    expected = load_file(one / "0.safetensors")
    found: dict[str, float] = {}
    for file in sorted(several.glob("*.safetensors")):
        for name, value in load_file(file).items():
            scale = max(1.0, float(expected[name].abs().max()))
            found[name] = max(found.get(name, 0.0), float((value - expected[name]).abs().max()) / scale)
    assert found.keys() == expected.keys()
    # in the first step B is zero, and so is the gradient of A
    assert not [name for name, value in expected.items() if not value.any() and "0 of " not in name]
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint or an adapter."""
    adapter = folder / "adapter_model.safetensors"
    reader = SafetensorsReader(adapter if adapter.is_file() else folder)
    return {key: reader.read(key) for key in reader}


def assert_equal_training(
    folder: Path, options: Mapping[str, Any], mesh: Mapping[str, int], ranks: int, sabotage: str = ""
) -> None:
    """The same training in one process and on ``ranks`` of ``mesh``, where a rule of sharding may be broken.

    With float8, after the first step, some of what differs by `TOLERANCE` is rounded to another of its few numbers.
    """
    tolerance = 5e-2 if options.get("lora.base_dtype") == "float8" else TOLERANCE
    first = ("gradient 0 ", "norm 0")
    one, several = folder / "one", folder / "several"
    if not one.exists():
        record(words_of({**options, "output_dir": one}), folder / "one-tensors")
    on_mesh: dict[str, Any] = {f"mesh.{axis}": size for axis, size in mesh.items()}
    run_ranks(ranks, record, words_of({**options, **on_mesh, "output_dir": several}), folder / "tensors", sabotage)
    found = differences(folder / "one-tensors", folder / "tensors")
    for tolerated, names in ((TOLERANCE, [name for name in found if name.startswith(first)]), (tolerance, found)):
        worst = max(names, key=lambda name: found[name])
        assert found[worst] < tolerated, f"{worst} differs by {found[worst]}"
    for kind in ("hf", "adapter"):
        if (one / kind).exists():
            expected, actual = weights(one / kind), weights(several / kind)
            assert expected.keys() == actual.keys()
            for key, value in expected.items():
                torch.testing.assert_close(actual[key], value, rtol=0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")
