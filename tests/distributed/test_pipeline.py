"""Pipeline stages: how layers are shared out, what is refused, and weights in and out of checkpoints."""

import json
from contextlib import nullcontext
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CohereConfig, Gemma2Config, Gemma3TextConfig, GraniteConfig, LlamaConfig

from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM
from nemo_automodel.components.distributed import MeshConfig
from nemo_automodel.components.distributed.stages import (
    keep_stage,
    stage_layers,
    stages_of,
    takes_micro_batches,
)
from nemo_automodel.components.elsewhere import Elsewhere
from nemo_automodel.components.loss import next_token_loss
from nemo_automodel.config import load_config
from nemo_automodel.recipes.step import compute_stage
from nemo_automodel.recipes.train import Run, TrainConfig, train
from tests.conftest import randomize, tiny
from tests.distributed.equality import options_of, words_of
from tests.distributed.ranks import run_ranks


@pytest.mark.parametrize(("first", "last"), [(0.0, 0.0), (0.0, 2.5), (1.5, 0.5), (0.0, 9.0)])
def test_the_costliest_stage_costs_as_little_as_can_be(first: float, last: float) -> None:
    for layers, stages in [(4, 2), (7, 3), (9, 4)]:

        def worst(counts: Any, stages: int = stages) -> float:
            return max(n + first * (i == 0) + last * (i == stages - 1) for i, n in enumerate(counts))

        counts = stage_layers(layers, stages, first, last)
        every = [c for c in product(range(1, layers), repeat=stages) if sum(c) == layers]
        assert sum(counts) == layers
        assert worst(counts) == min(map(worst, every))
    with pytest.raises(ValueError, match="5 pipeline stages of 4 layers"):
        stage_layers(4, 5, 0, 0)


def test_every_schedule_places_each_stage_once() -> None:
    assert stages_of(0, 2, "ZBVZeroBubble") == [0, 3]
    for schedule, each in [("1F1B", 1), ("Interleaved1F1B", 3), ("ZBVZeroBubble", 2)]:
        placed = [stage for rank in range(4) for stage in stages_of(rank, 4, schedule, each)]
        assert sorted(placed) == list(range(4 * each))


def test_schedules_say_how_many_stages_and_micro_batches_they_take() -> None:
    for schedule, stages, wanted in [("1F1B", 2, "1"), ("ZBVZeroBubble", 3, "2"), ("Interleaved1F1B", 1, "2 or more")]:
        with pytest.raises(ValueError, match=f"pp_virtual_stages={stages}: {schedule} has {wanted}"):
            MeshConfig(pp_schedule=schedule, pp_virtual_stages=stages)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pp_reduce_each=true with pp_schedule='ZBVZeroBubble'"):
        MeshConfig(pp_schedule="ZBVZeroBubble", pp_reduce_each=True)
    taken = {name: [n for n in range(1, 8) if takes_micro_batches(name, 2, n)] for name in ("1F1B", "Interleaved1F1B")}
    assert taken == {"1F1B": [2, 3, 4, 5, 6, 7], "Interleaved1F1B": [1, 2, 3, 4, 6]}


def test_a_stage_has_its_layers_under_their_names_and_a_plan_must_fit() -> None:
    def model(**changes: Any) -> Any:
        config = tiny(LlamaConfig, num_hidden_layers=3, architectures=["LlamaForCausalLM"], **changes)
        return NeMoAutoModelForCausalLM.from_config(config, device="meta")

    whole = set(dict(model().named_parameters()))
    parts = [model() for _ in range(3)]
    for stage, part in enumerate(parts):
        keep_stage(part, stage, 3)
    own = [set(dict(part.named_parameters())) for part in parts]
    assert set.union(*own) == whole
    assert sum(map(len, own)) == len(whole)
    assert isinstance(parts[0].lm_head, Elsewhere)
    assert isinstance(parts[2].model.embed_tokens, Elsewhere)
    tied = model(tie_word_embeddings=True)
    keep_stage(tied, 2, 3)
    assert tied.split_ties == {"lm_head.weight": "model.embed_tokens.weight"}
    for plan, problem in [
        ({}, "no _pp_plan with one list of layers"),
        ({"model.layers": ()}, "embed_tokens.weight is in no module that it names"),
        ({"model.blocks": ()}, "model.blocks matches no module"),
    ]:
        broken = model()
        broken._pp_plan = plan
        with pytest.raises(ValueError, match=problem):
            keep_stage(broken, 0, 3)


STEPS = 6


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (GraniteConfig, {"embedding_multiplier": 12.0, "logits_scaling": 8.0}),
        (Gemma2Config, {"final_logit_softcapping": 3.0}),
        (Gemma3TextConfig, {"tie_word_embeddings": True}),
        (CohereConfig, {"logit_scale": 0.25}),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_stages_one_behind_the_other_are_the_model(kind: Any, changes: dict[str, Any]) -> None:
    """Multipliers, caps and embeddings' scales belong to one stage each."""
    architecture = kind.__name__.removesuffix("Config").removesuffix("Text") + "ForCausalLM"
    config = tiny(kind, num_hidden_layers=3, pad_token_id=0, architectures=[architecture], **changes)
    whole = randomize(NeMoAutoModelForCausalLM.from_config(config)).eval()
    ids = torch.arange(12)[None]
    passed: dict[str, Any] = {"input_ids": ids, "labels": ids}
    for stage in range(3):
        part = deepcopy(whole)
        keep_stage(part, stage, 3)
        made = compute_stage(part, passed)
        passed = {**passed, "input_ids": made}
    assert torch.equal(made, next_token_loss(whole, {"input_ids": ids, "labels": ids}))


def _train_until(words: list[str], stop: int) -> None:
    """As if all ranks died after step ``stop``, which is saved."""
    step = Run.step

    def dying(self: Run, number: int) -> None:
        if number > stop:
            raise EOFError
        step(self, number)

    with pytest.MonkeyPatch.context() as patch, nullcontext() if stop == STEPS else pytest.raises(EOFError):
        patch.setattr(Run, "step", dying)
        train(load_config(TrainConfig, None, words), say=lambda line: None)


@pytest.mark.ranks
def test_a_run_goes_on_with_other_stages(tmp_path: Path) -> None:
    """Two steps each in two stages, in one process, and in four stages on two ranks; validation as well."""
    options = options_of(tmp_path, "llama", True, train__max_steps=STEPS, train__save_every=2)
    options["data.validation"] = options["data.train"]
    train(
        load_config(TrainConfig, None, words_of({**options, "output_dir": tmp_path / "whole"})), say=lambda line: None
    )
    meshes: list[dict[str, Any]] = [{"mesh.pp": 2}, {}, {"mesh.pp": 2, "mesh.pp_schedule": "ZBVZeroBubble"}]
    for number, mesh in enumerate(meshes):
        words = words_of({**options, **mesh, "output_dir": tmp_path / "moved"})
        run_ranks(2 if mesh else 1, _train_until, words, 2 * (number + 1))
    rows = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "moved")
    ]
    for key in ("loss", "val_loss", "grad_norm"):
        one, other = ([row[key] for row in each if key in row] for each in rows)
        assert other == pytest.approx(one, rel=1e-4), key


@pytest.mark.slow
def test_gradients_of_half_precision_add_up_alike_in_every_schedule(tmp_path: Path) -> None:
    """In fp32, wherever autograd's hooks are not called as well; and tied copies stay the same, on two ranks or one."""
    options = options_of(tmp_path, "llama", True, model__dtype="bfloat16", mesh__pp=2, optim__masters="stochastic")
    rows = []
    for schedule in ("Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"):
        words = words_of({**options, "mesh.pp_schedule": schedule, "output_dir": tmp_path / schedule})
        run_ranks(2, _train_until, words, STEPS)
        rows.append([json.loads(line) for line in (tmp_path / schedule / "metrics.jsonl").read_text().splitlines()])
    for key in ("loss", "grad_norm"):
        assert len({tuple(row[key] for row in each) for each in rows}) == 1, key
