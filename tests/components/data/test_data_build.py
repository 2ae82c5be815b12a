"""What becomes of rows that are too long or have nothing to learn, and the account of it."""

from dataclasses import asdict

import pytest

from nemo_automodel.components.data import dataset, preview


def test_overlong_rows(make_tokenizer, build, talk):
    tokenizer = make_tokenizer("chatml")
    rows = [{"messages": talk}, {"messages": talk[:2]}]
    [long, short], full = build(rows, tokenizer)
    limit = len(short)
    [kept], audit = build(rows, tokenizer, max_length=limit)
    assert (audit.read, audit.kept, audit.dropped, audit.truncated) == (2, 1, 1, 0)
    assert (audit.longest, kept.labels.tolist()) == (len(long), short.labels.tolist())
    cut, audit = build(rows, tokenizer, max_length=limit, overlong="truncate")
    assert (audit.read, audit.kept, audit.dropped, audit.truncated) == (2, 2, 0, 1)
    assert cut[0].labels.tolist() == long.labels[:limit].tolist()
    with pytest.raises(ValueError, match=rf"row 0: it has {len(long)} tokens, more than max_length \({limit}\)"):
        build(rows, tokenizer, max_length=limit, overlong="error")
    with pytest.raises(ValueError, match="only text rows can be split"):
        build(rows, tokenizer, max_length=limit, overlong="split")
    with pytest.raises(ValueError, match=r"no example is left to train on\. .*2 rows dropped"):
        build(rows, tokenizer, max_length=2)
    assert full.longest == len(long)


@pytest.mark.parametrize("limit", [2, 3, 5, 6])
def test_split_text_predicts_each_token_once(make_tokenizer, build, limit):
    tokenizer = make_tokenizer()
    [whole], _ = build([{"text": "hello there fox"}], tokenizer)
    pieces, audit = build([{"text": "hello there fox"}], tokenizer, max_length=limit, overlong="split")
    labels = [label for piece in pieces for label in piece.labels.tolist() if label != -100]
    assert labels == whole.input_ids[1:].tolist()
    assert max(map(len, pieces)) <= limit
    assert (audit.split, audit.kept) == (len(whole) > limit, len(pieces))


def test_rows_with_nothing_to_learn(make_tokenizer, build, talk):
    for bos in (False, True):
        tokenizer = make_tokenizer("chatml", bos=bos)
        for bad in ({"text": ""}, {"prompt": "ok", "completion": ""}, {"messages": talk[:1]}):
            with pytest.raises(ValueError, match=r"row 1: no token is supervised: no assistant .*It begins: "):
                build([{"messages": talk}, bad], tokenizer)
            examples, audit = build([{"messages": talk}, bad], tokenizer, unsupervised="drop")
            assert (len(examples), audit.read, audit.dropped_unsupervised) == (1, 2, 1)


def test_nothing_left_to_learn_after_truncation(make_tokenizer, build, talk):
    tokenizer = make_tokenizer("chatml")
    talk[0]["content"] = "fox " * 300
    with pytest.raises(ValueError, match=r"no token is supervised: .* beyond max_length \(20\)") as error:
        build([{"messages": talk}], tokenizer, max_length=20, overlong="truncate")
    excerpt = str(error.value).split("It begins: ")[1]
    assert len(excerpt) == 200
    assert excerpt.startswith("<|im_start|>user\nfox fox")


def test_the_account(make_tokenizer, build, talk, monkeypatch):
    tokenizer = make_tokenizer("chatml")
    rows = [{"messages": talk}, {"text": "hello fox"}, {"prompt": "ok", "completion": "four"}] * 3
    examples, audit = build(rows, tokenizer)
    monkeypatch.setattr(dataset, "_CHUNK", 2)
    again, same = build(rows, tokenizer)
    assert [example.labels.tolist() for example in examples] == [example.labels.tolist() for example in again]
    assert asdict(audit) == asdict(same)
    assert audit.tokens == sum(map(len, examples))
    assert audit.supervised_tokens == sum(int((example.labels != -100).sum()) for example in examples)
    assert "9 rows read, 9 examples kept; 0 rows dropped" in audit.summary()
    assert audit.summary().endswith(f"Chat template {audit.chat_template_sha256}.")
    assert build(rows, tokenizer, limit=4)[1].read == 4


def test_the_preview_shows_what_is_supervised(make_tokenizer, build, talk):
    tokenizer = make_tokenizer("chatml")
    [example], _ = build([{"messages": talk[:2]}], tokenizer)
    assert preview(example, tokenizer) == (
        "<|im_start|>user\nwhat is two plus two?<|im_end|>\n<|im_start|>assistant\n⟦four!<|im_end|>⟧\n"
    )
