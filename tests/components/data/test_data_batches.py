"""Tensors of a forward pass, and which documents share a row."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_automodel.components.data import Examples, collate, collate_packed, pack


def test_padded_batches(make_examples):
    examples = make_examples([3, 5])
    for multiple, length in [(1, 5), (4, 8)]:
        batch = collate(list(examples), pad_token_id=3, multiple_of=multiple)  # 3 is also a real, supervised token
        tail = length - 5
        assert {value.dtype for value in batch.values()} == {torch.long}
        assert batch["input_ids"].tolist() == [[1, 2, 3, 3, 3] + [3] * tail, [4, 5, 6, 7, 8] + [3] * tail]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0] + [0] * tail, [1] * 5 + [0] * tail]
        assert batch["labels"].tolist() == [
            [-100, 2, 3, -100, -100] + [-100] * tail,
            [-100, 5, 6, 7, 8] + [-100] * tail,
        ]


def test_pad_may_be_eos(make_tokenizer, build, talk):
    tokenizer = make_tokenizer("chatml", eos="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    examples, _ = build([{"messages": talk}, {"messages": talk[:2]}], tokenizer)
    labels = collate(examples, tokenizer.pad_token_id)["labels"]
    assert (labels == tokenizer.eos_token_id).sum(1).tolist() == [2, 1]


def test_packed_rows(make_examples):
    one, two, three = make_examples([3, 2, 4])
    batch = collate_packed([[one, two], [three]], 6, pad_token_id=0)
    assert set(batch) == {"input_ids", "position_ids", "labels"}  # a mask would hide the borders from transformers
    assert {value.dtype for value in batch.values()} == {torch.long}
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, -100], [-100, 7, 8, 9, -100, -100]]
    with pytest.raises(ValueError, match="6 tokens cannot hold examples of 7"):
        collate_packed([[one, three]], 6, pad_token_id=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_do_not_see_each_other(make_examples, attention):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, attn_implementation=attention, **size))
    examples = make_examples([5, 3, 7])

    def loss(batch):
        # A cache would keep transformers from reading the borders. num_items_in_batch=1: the sum over the labels.
        return model(**batch, use_cache=False, num_items_in_batch=1).loss

    packed = loss(collate_packed([examples], 20, pad_token_id=0))
    padded = loss(collate(list(examples), pad_token_id=0))
    alone = sum(loss(collate([example], pad_token_id=0)) for example in examples)
    terms = sum(int((example.labels != -100).sum()) for example in examples)
    torch.testing.assert_close(packed, alone)
    torch.testing.assert_close(padded, alone)
    assert alone.item() / terms == pytest.approx(math.log(32), rel=0.1)


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 120))
def test_packing_keeps_each_document_whole_once(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    used = [sum(lengths[index] for index in row) for row in rows]
    assert max(used, default=0) <= capacity
    if len(rows) <= 64:  # all rows stayed open: at most one is less than half full
        assert sum(room <= capacity // 2 for room in used) <= 1


def test_packing_is_tight_and_bounded(monkeypatch):
    lengths = torch.randint(50, 1500, (5000,), generator=torch.Generator().manual_seed(0)).tolist()
    assert len(pack(lengths, 2048)) * 2048 < 1.06 * sum(lengths)
    monkeypatch.setattr("nemo_automodel.components.data.batches._OPEN_ROWS", 2)
    assert pack([7, 6, 5, 3, 5], 10) == [[0], [1, 3], [2, 4]]  # the row of 7 was the fullest: closed when 5 came
    with pytest.raises(ValueError, match="example 1 has 11 tokens, more than a row of 10"):
        pack([1, 11], 10)


def test_examples_are_compact(make_examples):
    examples = make_examples([3, 2])
    assert [example.input_ids.dtype for example in examples] == [torch.int32] * 2
    assert examples[1].labels.tolist() == [-100, 5]
    assert examples.length(1) == len(examples[1]) == 2
    for index in (-1, 2):
        with pytest.raises(IndexError):
            examples[index]


def test_the_fingerprint_is_of_tokens_labels_and_borders():
    def fingerprint(*documents):
        examples = Examples()
        for ids, supervised in documents:
            examples.append(ids, bytes(supervised))
        return examples.fingerprint()

    first = ([1, 2], [0, 1]), ([3, 4], [0, 0])
    others = [
        (([1, 9], [0, 1]), ([3, 4], [0, 0])),
        (([1, 2], [0, 1]), ([3, 4], [0, 1])),
        (([1, 2, 3], [0, 1, 0]), ([4], [0])),
    ]
    assert fingerprint(*first) == fingerprint(*first)
    assert len({fingerprint(*documents) for documents in [first, *others]}) == 4
    assert 0 <= fingerprint(*first) < 2**63
