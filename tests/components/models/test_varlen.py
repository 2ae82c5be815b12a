"""Attention over packed documents: what torch's function is given, with a plain reference in its place."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen
from transformers import (
    DynamicCache,
    Gemma2Config,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Qwen2Config,
    Qwen2ForCausalLM,
    masking_utils,
)
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.models.common import decoder
from nemo_automodel.components.models.common.capabilities import ANY, ATTENTIONS, BY_IMPLEMENTATION, DOUBLE
from nemo_automodel.components.models.common.varlen import Documents
from nemo_automodel.recipes.transfer import inputs_of
from tests.conftest import assert_same_step, tiny, tokens, twins

LENGTHS = [[5, 1, 7, 3], [16], [9, 7]]
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
IDS = tokens(*POSITIONS.shape)

SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
MODELS = {
    "one key head a query head": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "two query heads a key head": (LlamaForCausalLM, LlamaConfig, {}),
    "one key head": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1}),
    "a head_dim of its own": (LlamaForCausalLM, LlamaConfig, {"head_dim": 16}),
    "a scale of its own": (GraniteForCausalLM, GraniteConfig, {"attention_multiplier": 0.5}),
    "a sliding and a full layer": (Qwen2ForCausalLM, Qwen2Config, SLIDING),
}


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """torch's ``varlen_attn``, by one document after the other in plain operations."""
    assert query.ndim == key.ndim == value.ndim == 3
    assert cu_seq_q.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert cu_seq_q[0] == 0
    assert cu_seq_q[-1] == len(query) == len(key) == len(value)
    assert max_q == max_k >= cu_seq_q.diff().max()
    group = query.shape[1] // key.shape[1]
    left, right = window_size
    outputs = []
    for begin, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        assert begin < end
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
        scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * (scale or q.shape[-1] ** -0.5)
        behind = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        hidden = (behind < -right if right >= 0 else behind != behind) | (behind > left if left >= 0 else False)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append((weights @ v.repeat_interleave(group, 0)).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The reference in place of torch's function, on any device and dtype; gives the list of its calls."""
    calls: list[Any] = []

    def called(*args: Any, **options: Any) -> Tensor:
        calls.append((args, options))
        return varlen_reference(*args, **options)

    monkeypatch.setattr(torch_varlen, "varlen_attn", called)
    runs_anywhere(monkeypatch)
    return calls


def runs_anywhere(monkeypatch: pytest.MonkeyPatch, name: str = "varlen") -> None:
    """As far as the table knows."""
    own = ATTENTIONS[name]
    table = replace(own, on={ANY: own.on["cuda"]._replace(dtypes=DOUBLE, compute=(0, 0))})
    monkeypatch.setitem(BY_IMPLEMENTATION, own.implementation, table)
    monkeypatch.setitem(ATTENTIONS, name, table)


def models(name: str) -> tuple[Any, Any]:
    """transformers' model with eager attention, ours with varlen."""
    hf_class, config_class, changes = MODELS[name]
    hf, ours = twins(hf_class, tiny(config_class, "eager", **changes))
    ours.set_attn_implementation("varlen")
    return hf, ours


@pytest.mark.parametrize("name", MODELS)
def test_a_step_equals_eager_with_a_mask(name: str, anywhere: list[Any]) -> None:
    hf, ours = models(name)
    assert_same_step(hf, ours, input_ids=IDS, labels=IDS, position_ids=POSITIONS, use_cache=False)
    windows = {"a sliding and a full layer": [(-1, 0), (2, 0)]}.get(name, [(-1, 0), (-1, 0)])
    assert [options["window_size"] for _, options in anywhere] == windows


@pytest.mark.parametrize("name", ["two query heads a key head", "a sliding and a full layer"])
def test_rows_are_documents_and_padding_on_the_right_needs_no_mask(name: str, anywhere: list[Any]) -> None:
    hf, ours = models(name)
    assert_same_step(hf, ours, input_ids=IDS, labels=IDS, use_cache=False)
    mask = torch.ones_like(IDS)
    mask[1, 11:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    assert_same_step(hf, ours, real=mask, input_ids=IDS, labels=labels, attention_mask=mask, use_cache=False)


def test_documents_are_found_once_and_no_mask_is_made(anywhere: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = models("two query heads a key head")
    found: list[Documents] = []
    of = Documents.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Documents, "of", classmethod(lambda cls, ids: found.append(of(cls, ids)) or found[-1]))
    monkeypatch.setattr(decoder, "MASKS", {})
    expected = ours(IDS, position_ids=POSITIONS).logits
    assert len(found) == 1
    assert len(anywhere) == 2
    given = Documents.of(POSITIONS)
    found.clear()
    assert torch.equal(ours(IDS, position_ids=POSITIONS, **given.as_inputs()).logits, expected)
    assert found == []


def test_gradient_checkpointing_gives_the_same_bits(anywhere: list[Any]) -> None:
    _, ours = models("two query heads a key head")
    gradients = []
    for _ in range(2):
        ours.zero_grad()
        ours.train()(IDS, position_ids=POSITIONS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in ours.named_parameters()})
        # transformers 5.23 renamed it; 5.17 has the old name only
        enable = getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    assert len(anywhere) == 2 * (1 + 2)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize(
    "positions",
    [POSITIONS, torch.arange(7, 12)[None], torch.tensor([[0, 0, 1, 1, 1, 2], [4, 5, 6, 0, 1, 2]])],
    ids=["packed", "not from zero", "odd"],
)
def test_borders_are_where_transformers_has_them(positions: Tensor) -> None:
    documents = Documents.of(positions)
    index = find_packed_sequence_indices(positions)
    index = torch.zeros_like(positions) if index is None else index
    lengths = [int(n) for row in index for n in row.unique_consecutive(return_counts=True)[1]]
    assert documents.bounds.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert documents.bounds.dtype == torch.int32
    assert documents.longest == max(lengths)


def test_rows_without_positions() -> None:
    documents = Documents.rows(3, 16, torch.device("cpu"))
    expected = Documents.of(torch.arange(16).expand(3, -1))
    assert torch.equal(documents.bounds, expected.bounds)
    assert documents.longest == expected.longest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_refused_on_the_cpu(dtype: torch.dtype) -> None:
    model = NeMoAutoModelForCausalLM.from_config(tiny(), backend={"attn": "varlen"}, dtype=dtype)
    assert model.config._attn_implementation == "varlen"
    with pytest.raises(
        ValueError, match=r"'varlen' has no kernel for .*float.* on cpu, .*: use backend.attn='sdpa' or 'f"
    ):
        model(IDS)


GAPS = {
    "left padding": ({"attention_mask": torch.tensor([[0, 1, 1]])}, "attention_mask with padding on the left"),
    "a hole": ({"attention_mask": torch.tensor([[1, 0, 1]])}, "attention_mask with padding on the left or in between"),
    "4-D mask": ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "masks ready made"),
    "masks by layer type": ({"attention_mask": {"full_attention": None}}, "masks ready made"),
    "cache": ({"past_key_values": DynamicCache()}, "cache of keys and values"),
}


@pytest.mark.parametrize("case", GAPS)
def test_what_it_does_not_have_is_refused_before_anything_runs(case: str, anywhere: list[Any]) -> None:
    _, ours = models("two query heads a key head")
    inputs, message = GAPS[case]
    with pytest.raises(ValueError, match=f"attention 'varlen' has no {message}.*use backend.attn='sdpa'"):
        ours(IDS[:1, :3], **inputs)
    assert anywhere == []


def test_generation_is_refused(anywhere: list[Any]) -> None:
    _, ours = models("two query heads a key head")
    with pytest.raises(ValueError, match="has no cache of keys and values"):
        ours.generate(IDS[:1], max_new_tokens=2)
    assert torch.equal(
        ours.generate(IDS[1:2, :8], max_new_tokens=4, do_sample=False, use_cache=False),
        models("two query heads a key head")[0].generate(IDS[1:2, :8], max_new_tokens=4, do_sample=False),
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny(Gemma2Config, head_dim=8), r"softcap on the scores, as this model needs .*: use backend.attn='flex'"),
        (tiny(head_dim=12), r"head_dim of 12, only multiples of 8 up to 256"),
        (tiny(head_dim=264), r"head_dim of 264,"),
    ],
    ids=["softcap", "odd head_dim", "wide head_dim"],
)
def test_models_that_it_cannot_serve_are_refused_when_built(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"attention 'varlen' has no {message}"):
        NeMoAutoModelForCausalLM.from_config(config, backend={"attn": "varlen"})


def test_a_head_dim_that_it_does_not_take_is_refused_where_nobody_built_for_it(anywhere: list[Any]) -> None:
    for model in twins(LlamaForCausalLM, tiny(LlamaConfig, "eager", head_dim=12)):
        model.set_attn_implementation("varlen")
        with pytest.raises(ValueError, match="'varlen' has no head_dim of 12, only multiples of 8"):
            model(IDS, use_cache=False)
    assert anywhere == []


def test_transformers_own_class_takes_it_too(anywhere: list[Any]) -> None:
    eager = models("two query heads a key head")[0]
    own = copy.deepcopy(eager)
    own.set_attn_implementation("varlen")
    inputs = {"position_ids": POSITIONS, "use_cache": False}
    torch.testing.assert_close(own(IDS, **inputs).logits, eager(IDS, **inputs).logits, atol=1e-5, rtol=1e-5)
    left = torch.ones_like(IDS)
    left[0, :4] = 0
    with pytest.raises(ValueError, match="has no attention_mask with padding on the left"):
        own(IDS, attention_mask=left, use_cache=False)


def flash_by_bounds(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: None, **options: Any) -> Any:
    """transformers' function for FlashAttention, where it is given bounds: whatever the number of rows."""
    assert attention_mask is None
    bounds = options["cu_seq_lens_q"], options["cu_seq_lens_k"], options["max_length_q"], options["max_length_k"]
    window = (-1 if options["sliding_window"] is None else options["sliding_window"] - 1, 0)
    flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    output = varlen_reference(*flat, *bounds, scale=options["scaling"], window_size=window)
    assert options.get("deterministic", False) is torch.are_deterministic_algorithms_enabled()
    return output.unflatten(0, (q.shape[0], q.shape[2])), None


@pytest.mark.parametrize("implementation", ["flash_attention_2", "kernels-community/flash-attn2"])
@pytest.mark.parametrize("name", ["two query heads a key head", "a sliding and a full layer"])
def test_flash_attention_is_given_the_bounds_of_packed_rows(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers looks for documents only where there is one row; several would see each other."""
    runs_anywhere(monkeypatch, "flash2")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, implementation, flash_by_bounds)
    hf, ours = models(name)
    ours.config._attn_implementation = implementation
    assert_same_step(hf, ours, input_ids=IDS, labels=IDS, position_ids=POSITIONS, use_cache=False)
    bounds, longest = Documents.of(POSITIONS)
    inputs = inputs_of(ours, {"input_ids": IDS, "position_ids": POSITIONS}, torch.device("cpu"))
    assert torch.equal(inputs["cu_seq_lens_k"], bounds)
    assert inputs["max_length_k"] == longest
    torch.use_deterministic_algorithms(True)
    try:
        ours(**inputs, use_cache=False)
    finally:
        torch.use_deterministic_algorithms(False)


def test_flash_attention_gets_positions_only_where_it_must_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which it does in every layer, and makes the host wait for the device."""
    seen: list[Tensor | None] = []

    def spy(module: Any, q: Tensor, *others: Any, **options: Any) -> Any:
        seen.append(options["position_ids"])
        return q.transpose(1, 2), None

    runs_anywhere(monkeypatch, "flash2")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", spy)
    _, ours = models("two query heads a key head")
    ours.config._attn_implementation = "flash_attention_2"
    with monkeypatch.context() as patch:  # for a mask, once a forward pass: it has none
        patch.setattr(masking_utils, "find_packed_sequence_indices", None)
        ours(IDS, use_cache=False)
        ours(IDS, position_ids=POSITIONS, use_cache=False)
    assert seen == [None] * len(seen)
    ours(IDS, position_ids=POSITIONS, past_key_values=DynamicCache(config=ours.config))
    assert seen[-1] is POSITIONS


def test_flash_attention_is_told_of_whole_rows_by_layers_that_use_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With positions and no bounds it would look for documents, in every layer."""
    seen: list[dict[str, Any]] = []

    def spy(module: Any, q: Tensor, *others: Any, **options: Any) -> Any:
        seen.append(options)
        return q.transpose(1, 2), None

    runs_anywhere(monkeypatch, "flash3")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_3", spy)
    config = tiny(Ministral3Config, sliding_window=None)
    ours = NeMoAutoModelForCausalLM.from_config(config)
    ours.config._attn_implementation = "flash_attention_3"
    ours(IDS, use_cache=False)
    assert ours.model.spec.rope.query_growth is not None
    rows, length = IDS.shape
    for options in seen:
        assert options["cu_seq_lens_q"].tolist() == list(range(0, (rows + 1) * length, length))
        assert options["position_ids"] is not None
    assert seen
