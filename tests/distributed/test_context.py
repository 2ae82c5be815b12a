"""Ranks that share sequences compute what one does with whole ones: families, masks, positions; and what is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.experimental._attention import _HeadTailLoadBalancer
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    PreTrainedConfig,
    Qwen3Config,
    SmolLM3Config,
)

from nemo_automodel._transformers import registry
from nemo_automodel.components.distributed import Mesh, NotShared, parallelize_context, part_of
from nemo_automodel.components.distributed.context import SharedSequence
from nemo_automodel.components.loss import IGNORE, next_token_loss
from nemo_automodel.components.models.common.decoder import DecoderModel
from nemo_automodel.config import load_config
from nemo_automodel.recipes.checks import check_packing
from nemo_automodel.recipes.meshes import build_mesh
from nemo_automodel.recipes.step import own_part
from nemo_automodel.recipes.train import TrainConfig
from tests.conftest import assert_near, randomize, tiny, tokens
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.ranks

LENGTH = 24
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 2.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}

FAMILIES: dict[str, PreTrainedConfig] = {
    "Gemma2": tiny(Gemma2Config, "eager", head_dim=8, **WINDOWS),  # windows, softcaps
    "Gemma3": tiny(Gemma3TextConfig, "sdpa", head_dim=8, **WINDOWS),  # windows, norms of heads, a RoPE for each type
    "Qwen3": tiny(Qwen3Config, "sdpa", head_dim=8),  # norms of heads
    "SmolLM3": tiny(SmolLM3Config, "eager", no_rope_layers=[1, 0], pad_token_id=None),  # a layer without RoPE
    "Ministral3": tiny(  # queries that grow with the position
        Ministral3Config, "sdpa", head_dim=8, rope_parameters={**YARN, "llama_4_scaling_beta": 0.5}
    ),
    "Llama": tiny(LlamaConfig, "sdpa", max_position_embeddings=16, rope_parameters=DYNAMIC),  # frequencies by length
}


def _build(name: str, config: PreTrainedConfig) -> Any:
    return randomize(registry.resolve(f"{name}ForCausalLM")(copy.deepcopy(config))).train()


def _batch(kind: str) -> dict[str, Tensor]:
    """Two rows, "plain" or as the words say; those packed have documents that go over every cut."""
    ids = tokens(2, LENGTH)
    labels = ids.clone()
    if kind == "half empty":  # a rank has nothing to predict
        labels[:, LENGTH // 2 + 1 :] = IGNORE
    if kind in ("plain", "half empty"):
        return {"input_ids": ids, "labels": labels}
    if kind == "padded on the left":
        mask = torch.ones_like(ids)
        mask[0, :7], labels[0, :8] = 0, IGNORE
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}
    starts = torch.tensor([[0, 5, 16], [0, 10, 14]])
    labels.scatter_(1, starts, IGNORE)
    since = torch.zeros_like(ids).scatter_(1, starts, starts).cummax(1).values
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(LENGTH) - since}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def _mesh(method: Any = "all_to_all") -> Mesh:
    return Mesh({"cp": dist.get_world_size()}, cp_method=method)


def _same_step(name: str, config: PreTrainedConfig, kind: str, method: str = "all_to_all") -> None:
    whole, shared, mesh = _build(name, config), _build(name, config), _mesh(method)
    expected = next_token_loss(whole, _batch(kind))
    expected.backward()
    parallelize_context(shared, mesh)
    actual = next_token_loss(shared, own_part(_batch(kind), mesh))
    actual.backward()
    loss, wanted = actual.detach().clone(), _gradients(whole)
    dist.all_reduce(loss)
    assert_near(loss, expected.detach(), what=f"{name}, {kind}: loss")
    assert _gradients(shared).keys() == wanted.keys()
    for parameter, gradient in _gradients(shared).items():
        dist.all_reduce(gradient)
        assert_near(gradient, wanted[parameter], what=f"{name}, {kind}: {parameter}")


def _same_steps() -> None:
    for name, config in FAMILIES.items():
        for kind in ("plain", "packed"):
            _same_step(name, config, kind)
    for kind in ("padded on the left", "half empty"):
        _same_step("Qwen3", FAMILIES["Qwen3"], kind)


def test_families_take_the_same_step() -> None:
    run_ranks(2, _same_steps)


def _same_steps_in_a_ring() -> None:
    for name in ("Qwen3", "Ministral3", "Llama"):
        _same_step(name, FAMILIES[name], "plain", "ring")
    _same_step("Llama", tiny(LlamaConfig, "sdpa", num_key_value_heads=1), "plain", "ring")  # fewer heads than ranks


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_ring_takes_the_same_step(ranks: int) -> None:
    run_ranks(ranks, _same_steps_in_a_ring)


def _refusals_of_a_ring() -> None:
    for name, kind, message in (
        ("Qwen3", "packed", "ring has no masks"),
        ("Gemma3", "plain", "ring has no masks"),
        ("Gemma2", "plain", "ring has no attention 'eager', only 'sdpa': set mesh.cp_method=all_to_all"),
    ):
        with pytest.raises(NotShared, match=message):
            _same_step(name, FAMILIES[name], kind, "ring")
    with pytest.raises(NotShared, match=r"ring has no dropout of attention weights \(0.1\)"):
        _same_step("Llama", tiny(LlamaConfig, "sdpa", attention_dropout=0.1), "plain", "ring")


def test_what_does_not_go_in_a_ring_is_refused() -> None:
    run_ranks(2, _refusals_of_a_ring)


def _meshes(model: Path) -> None:
    def build(**more: Any) -> Mesh:
        options = {"output_dir": model, "model.path": model, "data.train": model, "mesh.cp": 2, **more}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return build_mesh(load_config(TrainConfig, None, words), torch.device("cpu"))

    with pytest.raises(ValueError, match="cp=2 does not divide the 1 KV heads; leave it at 1"):
        build()
    ring, packed = {"mesh.cp_method": "ring"}, {"data.packing": "true", "data.max_length": 12}
    assert build(**ring).sequence_cut == 4
    with pytest.raises(ValueError, match=r"mesh.cp_method=ring has no packed documents: set mesh.cp_method=all_to_all"):
        build(**ring, **packed)
    with pytest.raises(ValueError, match=r"data.max_length=13 must be a multiple of 2, over which cp=2 cuts sequences"):
        build(**{**packed, "data.max_length": 13})


def test_meshes_that_the_model_or_the_data_do_not_fit_are_refused(tmp_path: Path) -> None:
    tiny(num_key_value_heads=1).save_pretrained(tmp_path)
    run_ranks(2, _meshes, tmp_path)


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_of_a_ring_are_those_that_torch_takes(ranks: int) -> None:
    whole = torch.arange(12)[None]
    parts = torch.cat([part_of(whole, rank, ranks, balanced=True) for rank in range(ranks)], 1)
    assert parts.equal(_HeadTailLoadBalancer(12, ranks, "cpu")._generate_indices())
    assert Mesh.sequence_cut.fget(SimpleNamespace(cp=ranks, cp_method="ring", sequence_parallel=False)) == 2 * ranks


def _blind(model: Any, *args: Any) -> Any:
    """Masks as if a rank's positions were all there is: they see no documents but its own, from its own beginning."""
    spanned, mask, cache, positions = args
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return _MASKS(
        model,
        spanned,
        mask,
        cache,
        positions if positions is None else part_of(positions, rank, ranks).repeat(1, ranks),
    )


_MASKS = DecoderModel._masks


def _unseen_documents(model: Any, spanned: Tensor, mask: Any, cache: Any, positions: Any) -> Any:
    return _MASKS(model, spanned, mask, cache, None)


def _with_masks(masks: Any, function: Callable[..., None], *args: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecoderModel, "_masks", masks)
        function(*args)


def _from_zero(_: Any, x: Tensor, dim: int = 1) -> Tensor:
    return x[:, : x.shape[1] // dist.get_world_size()]


def _with_positions_from_zero() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedSequence, "part", _from_zero)
        _same_step("Qwen3", FAMILIES["Qwen3"], "plain")


def test_positions_of_a_part_alone_are_noticed() -> None:
    with pytest.raises(AssertionError, match="Qwen3, plain: loss"):
        run_ranks(2, _with_positions_from_zero)


def test_masks_of_a_part_alone_are_noticed() -> None:
    with pytest.raises(AssertionError, match="Qwen3, packed: loss"):
        run_ranks(2, _with_masks, _blind, _same_step, "Qwen3", FAMILIES["Qwen3"], "packed")


def _check_packing() -> None:
    model, mesh = _build("Qwen3", FAMILIES["Qwen3"]), _mesh()
    parallelize_context(model, mesh)
    check_packing(model, torch.device("cpu"), mesh)
    with pytest.raises(ValueError, match="packed documents see each other"):  # on every rank
        _with_masks(_unseen_documents, check_packing, model, torch.device("cpu"), mesh)
    with pytest.raises(ValueError, match="no cache: give use_cache=False"):
        model(input_ids=tokens(1, 4))
    with pytest.raises(ValueError, match="take targets, shifted before the cut, not labels"):
        model(input_ids=tokens(1, 4), labels=tokens(1, 4), use_cache=False)
    with pytest.raises(NotShared, match=r"LlamaForCausalLM: LlamaModel does not declare .* set mesh.cp=1"):
        parallelize_context(LlamaForCausalLM(tiny()), mesh)


def test_packing_is_checked_and_what_cannot_share_is_refused() -> None:
    run_ranks(2, _check_packing)


def test_parts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="2 context-parallel ranks cannot share a sequence of 7 tokens: pad it"):
        part_of(torch.zeros(1, 7), 0, 2)
    with pytest.raises(ValueError, match=r"2 context-parallel ranks .* 6 tokens: pad it to a multiple of 4"):
        part_of(torch.zeros(1, 6), 0, 2, balanced=True)


@pytest.mark.parametrize(
    ("method", "targets"),
    [("all_to_all", [1, 2, 3, 4, 5, 6, 7, IGNORE]), ("ring", [1, 2, 7, IGNORE, 3, 4, 5, 6])],
)
def test_targets_cross_the_cut(method: Any, targets: list[int]) -> None:
    mesh = Mesh(cp_method=method)
    mesh.cp, mesh.place = 2, {"cp": 0}
    labels = torch.arange(8)[None]
    batch = {"input_ids": labels, "labels": labels, "position_ids": labels}
    parts = []
    for mesh.place["cp"] in range(2):
        part = own_part(batch, mesh)
        assert "labels" not in part
        assert part["position_ids"].shape == (1, 8)
        parts.append(part["targets"])
    assert torch.cat(parts, 1).tolist() == [targets]
