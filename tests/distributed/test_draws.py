"""Dropout of tensor-parallel ranks: what all compute drops alike, what each has a part of drops by itself."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.distributed import Mesh, Options, parallelize, parallelize_tensors
from nemo_automodel.components.models.common.tp_plan import tp_plan_of
from nemo_automodel.config import load_config
from nemo_automodel.recipes.train import Run, TrainConfig
from tests.conftest import tiny
from tests.distributed.equality import options_of, words_of
from tests.distributed.ranks import run_ranks

P = 0.5
DROPOUT = {"llama": {"attention_dropout": P}, "phi3": {"attention_dropout": P, "resid_pdrop": P}}
NO_SEQUENCE = {"mesh__sequence_parallel": "false"}


@contextmanager
def _watching() -> Iterator[list[Tensor]]:
    """What every dropout lets through, in order."""
    masks: list[Tensor] = []
    inner = F.dropout

    def spy(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        y = inner(x, p, training, inplace)
        if training and p > 0:
            masks.append((y.detach() != 0) | (x.detach() == 0))
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", spy)
        yield masks


def _first_step(words: list[str]) -> tuple[list[numpy.ndarray], dict[str, numpy.ndarray]]:
    """The masks of its passes, and the gradients that it gave."""
    run = Run(load_config(TrainConfig, None, words), say=lambda line: None)
    run.optimizer.step = lambda lr: torch.zeros(())  # type: ignore[method-assign]  # leaves gradients where they are
    with _watching() as masks:
        run.step(1)
    gradients = {name: p.grad.full_tensor() for name, p in run.optimizer.parameters.items() if p.grad is not None}  # type: ignore[attr-defined]
    return [mask.numpy() for mask in masks], {name: each.numpy() for name, each in gradients.items()}


def _first_steps(folder: Path, family: str, **more: Any) -> list[tuple[list[Any], dict[str, Any]]]:
    options = options_of(folder, family, False, train__micro_batch_size=8, model__attn_implementation="eager", **more)
    file = options["model.path"] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | DROPOUT[family]))
    adapters = {"lora.r": 4, "lora.dropout": P}
    return run_ranks(2, _first_step, words_of({**options, **adapters, "mesh.tp": 2, "output_dir": folder / "run"}))


def _in_common(one: Any, other: Any) -> float:
    """The share of two masks: one if they are the same, a half if they are independent and let half through."""
    return float((one == other).mean())


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("family", "options", "alike"),
    [
        # of a layer: adapters of qkv, attention's weights, adapters of o, of gate and up, of down
        ("llama", {}, [True, False, False, True, False]),
        ("llama", NO_SEQUENCE, [True, False, False, True, False]),
        # and what is added to the residual stream: a part of the sequence, or the whole
        ("phi3", {}, [True, False, False, False, True, False, False]),
        ("phi3", NO_SEQUENCE, [True, False, False, True, True, False, True]),
    ],
    ids=str,
)
def test_masks_are_alike_where_activations_are(
    family: str, options: dict[str, str], alike: list[bool], tmp_path: Path
) -> None:
    (zero, _), (one, _) = _first_steps(tmp_path, family, **options)
    assert len(zero) == len(one) == 4 * len(alike)
    for masks, same in zip(zip(zero, one, strict=True), 4 * alike, strict=True):
        assert all(abs(mask.mean() - (1 - P)) < 0.1 for mask in masks) or masks[0].ndim == 4  # which is causal
        assert _in_common(*masks) == 1 if same else _in_common(*masks) < 0.9
    for masks in (zero, one):  # and each is another one than in the layer before
        assert all(_in_common(a, b) < 0.9 for a, b in zip(masks, masks[len(alike) :], strict=False))


@pytest.mark.ranks
@pytest.mark.parametrize("family", DROPOUT)
def test_what_is_computed_again_drops_the_same(family: str, tmp_path: Path) -> None:
    (once, kept), _ = _first_steps(tmp_path, family)
    for how in ("true", "selective"):
        (twice, again), _ = _first_steps(tmp_path, family, model__gradient_checkpointing=how)
        assert len(twice) > len(once) * 1.5
        assert kept.keys() == again.keys()
        assert any(gradient.any() for gradient in kept.values())
        assert all(numpy.array_equal(again[name], gradient) for name, gradient in kept.items()), how


class _ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.dropout = nn.Linear(4, 4), nn.Dropout(0.1)


def _refused() -> None:
    with pytest.raises(ValueError, match="dropout has dropout, and tensor parallelism cannot know"):
        parallelize_tensors(_ByHand(), {"up_proj": "colwise"}, init_device_mesh("cpu", (2,)))
    config = tiny(LlamaConfig, attention_dropout=0.1, architectures=["LlamaForCausalLM"])
    model = NeMoAutoModelForCausalLM.from_config(config, device="meta")
    with pytest.raises(ValueError, match=r"mesh.tp=2: model.layers.0.self_attn has dropout, of which compiled layers"):
        parallelize(model, Mesh({"tp": 2}), Options(tp_plan=tp_plan_of(model), compile=True))
    with pytest.raises(ValueError, match="gradient_checkpointing=true is more than torch compiles"):
        parallelize(model, Mesh({"tp": 2}), Options(tp_plan=tp_plan_of(model), compile=True, checkpointing=True))


@pytest.mark.ranks
def test_what_would_be_wrong_or_die_is_refused() -> None:
    run_ranks(2, _refused)
