"""Flex attention beside eager attention in float32: packed documents, windows, softcap, padding, a cache.

Without its compiler, which takes half a minute; the longer suite has one test with it. torch trains it on a GPU only.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.models.common import decoder, flex
from nemo_automodel.components.models.common.flex import block_mask, document_begins
from tests.conftest import assert_near, tiny, tokens, twins, uncompiled

LENGTHS = [[130, 1, 57, 112], [300]]
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
IDS = tokens(*POSITIONS.shape)
SLIDING = {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 1}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "one key head a query head": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "one key head": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1}),
    "three query heads a key head": (
        LlamaForCausalLM,
        LlamaConfig,
        {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2},
    ),
    "a sliding and a full layer": (Qwen2ForCausalLM, Qwen2Config, SLIDING),
    "windows and softcap": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"sliding_window": 30, "head_dim": 8, "attn_logit_softcapping": 2.0},
    ),
}
SOME = ("one key head", "a sliding and a full layer", "windows and softcap")


def models(name: str) -> tuple[Any, Any]:
    """transformers' model with eager attention, ours with flex."""
    hf_class, config_class, changes = MODELS[name]
    hf, ours = twins(hf_class, tiny(config_class, "eager", **changes))
    ours.set_attn_implementation("flex_attention")
    return hf, ours


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without a compiler, and with nobody else's masks."""
    monkeypatch.setattr(decoder, "MASKS", {})
    with torch.no_grad(), uncompiled("flex_attention"):
        yield


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_equal_eager(name: str) -> None:
    hf, ours = models(name)
    for inputs in ({"position_ids": POSITIONS}, {}):
        assert_near(ours(IDS, use_cache=False, **inputs).logits, hf(IDS, use_cache=False, **inputs).logits)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("name", SOME)
def test_a_document_leaves_the_others_alone(name: str) -> None:
    ours = models(name)[1]
    changed = IDS.clone()
    begin, end = 131, 188  # the third document of the first row
    changed[0, begin:end] = changed[0, begin:end].flip(0)
    before, after = (ours(ids, position_ids=POSITIONS, use_cache=False).logits for ids in (IDS, changed))
    assert not torch.equal(before[0, begin:end], after[0, begin:end])
    before[0, begin:end] = after[0, begin:end] = 0
    assert torch.equal(before, after)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("name", SOME)
def test_padding_on_both_sides_equals_eager(name: str) -> None:
    hf, ours = models(name)
    mask = torch.ones_like(IDS)
    mask[0, :140], mask[1, 200:] = 0, 0
    expected, actual = (model(IDS, attention_mask=mask, use_cache=False).logits for model in (hf, ours))
    assert_near(actual[mask.bool()], expected[mask.bool()])


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("length", [7, 125], ids=["short", "over a block's end"])
@pytest.mark.parametrize("name", SOME)
def test_greedy_tokens_with_a_cache_are_those_of_eager(name: str, length: int) -> None:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 0}
    expected, actual = (model.generate(IDS[:, :length], **options) for model in models(name))
    assert torch.equal(actual, expected)


def first_seen(positions: Tensor, window: int | None) -> Tensor:
    """Token by token."""
    rows = []
    for row in positions.tolist():
        begins = [0]
        for index in range(1, len(row)):
            begins.append(begins[-1] if row[index] == row[index - 1] + 1 else index)
        rows.append([max(begin, i - (window or len(row)) + 1) for i, begin in enumerate(begins)])
    return torch.tensor(rows)


@pytest.mark.parametrize("window", [None, 1, 128, 129, 200])
@pytest.mark.parametrize("length", [1, 127, 128, 300])
def test_the_blocks_are_those_that_torch_finds_token_by_token(length: int, window: int | None) -> None:
    positions = POSITIONS[:, :length]
    first = first_seen(positions, window)
    made = block_mask(flex._with_window(document_begins(positions), window))
    expected = create_block_mask(
        lambda b, h, q, k: (first[b, q] <= k) & (k <= q), 2, None, length, length, device="cpu"
    )
    assert torch.equal(made.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(made, name), getattr(expected, name)), name


def test_the_device_is_asked_nothing() -> None:
    """Tensors without values cannot answer."""
    with FakeTensorMode():
        made = block_mask(document_begins(torch.empty(2, 4096, dtype=torch.int64)))
    assert made.kv_indices.shape == (2, 1, 32, 32)


@pytest.mark.usefixtures("plain")
def test_masks_are_made_once_a_pass_and_kept_where_rows_have_no_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = models("a sliding and a full layer")[1]
    made: list[Tensor] = []
    monkeypatch.setattr(flex, "block_mask", lambda first, *rest: made.append(first) or block_mask(first, *rest))
    flex._of_rows.cache_clear()
    for _ in range(2):
        ours(IDS, use_cache=False)
    assert len(made) == 2  # one for each type of layer, once
    ours(IDS, position_ids=POSITIONS, use_cache=False)
    assert len(made) == 4
    flex._of_rows.cache_clear()


@pytest.mark.parametrize("kind", ["holes", "ready made", "a cache of a fixed size"])
def test_other_masks_are_transformers(kind: str) -> None:
    hf, ours = models("one key head")
    ids = IDS[:1, :6]
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]])
    given: dict[str, Any] = {
        "holes": {"attention_mask": mask},
        "ready made": {"attention_mask": torch.full((1, 1, 6, 6), float("-inf")).triu(1)},
        "a cache of a fixed size": {"past_key_values": StaticCache(ours.config, max_cache_len=8)},
    }[kind]
    with torch.no_grad(), uncompiled("flex_attention"):
        actual = ours(ids, **given).logits
        given.pop("past_key_values", None)
        expected = hf(ids, **given).logits
    seen = mask.bool() if kind == "holes" else torch.ones_like(mask).bool()
    assert_near(actual[seen], expected[seen])


def test_dropout_is_refused_when_it_trains() -> None:
    """A checkpoint that was trained with dropout is evaluated without."""
    ours = NeMoAutoModelForCausalLM.from_config(tiny(attention_dropout=0.1), backend={"attn": "flex"})
    with torch.no_grad(), uncompiled("flex_attention"):
        assert ours.eval()(IDS).logits.isfinite().all()
        with pytest.raises(
            ValueError, match=r"'flex' has no dropout .*\(0.1\): use backend.attn='sdpa' .*or set attention_dr"
        ):
            ours.train()(IDS)


@pytest.mark.slow
def test_compiled_too() -> None:
    hf, ours = models("windows and softcap")
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 0}
    with torch.no_grad():
        for inputs in ({"position_ids": POSITIONS}, {}):
            assert_near(ours(IDS, use_cache=False, **inputs).logits, hf(IDS, use_cache=False, **inputs).logits)
        assert torch.equal(ours.generate(IDS[:, :9], **options), hf.generate(IDS[:, :9], **options))
