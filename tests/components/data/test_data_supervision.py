"""Which tokens are supervised, for each format and kind of chat template."""

from pathlib import Path

import pytest

MARK, END = "{% generation %}", "{% endgeneration %}"


def supervised(example, tokenizer):
    """The text of each run of supervised tokens."""
    texts, inside = [], False
    for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
        assert label in (token, -100)
        if label != -100:
            texts[len(texts) - 1 if inside else len(texts) :] = [(texts[-1] if inside else []) + [token]]
        inside = label != -100
    return [tokenizer.decode(ids) for ids in texts]


def reference(tokenizer, messages, chat_template):
    """Token ids and the mask that transformers makes from generation tags."""
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=chat_template, return_dict=True, return_assistant_tokens_mask=True
    )
    return encoded["input_ids"], encoded["assistant_masks"]


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("tags", [("", ""), (MARK, END)])
@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3"])
def test_all_assistant_turns_and_their_ends(make_tokenizer, template, build, talk, name, tags, bos, trim):
    tokenizer = make_tokenizer(template(name, *tags), bos=bos, trim=trim)
    [example], audit = build([{"messages": talk}], tokenizer)
    close, gap = (" </s>", " ") if name == "llama2" else ("<|im_end|>", "")
    assert supervised(example, tokenizer) == [f"{gap}four!{close}", f"{gap}the quick\n\nbrown fox{close}"]
    # As at inference: the ids of apply_chat_template, so no BOS but the template's.
    assert example.input_ids.tolist() == tokenizer.apply_chat_template(talk)["input_ids"]
    assert audit.tokens == len(example)
    assert audit.supervised_tokens == (example.labels != -100).sum()


@pytest.mark.parametrize("tags", [("", ""), (MARK, END)])
@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3"])
def test_the_mask_of_transformers_is_the_same(make_tokenizer, template, build, talk, name, tags):
    tokenizer = make_tokenizer(template(name, *tags))
    [example], _ = build([{"messages": talk}], tokenizer)
    ids, mask = reference(tokenizer, talk, template(name, MARK, END))
    assert example.input_ids.tolist() == ids
    assert (example.labels != -100).int().tolist() == mask


@pytest.mark.parametrize("left", ["{%", "{%-", "  {%", "\n  {%-", "x\n\t{%"])
@pytest.mark.parametrize("right", ["%}", "-%}", "%}\n", "%}\n  ", "-%}\n  "])
def test_generation_tags_with_any_white_space(make_tokenizer, template, build, talk, left, right):
    chat = template("chatml", f"{left} generation {right}", f"{left}endgeneration{right}")
    tokenizer = make_tokenizer(chat)
    if left.startswith("x"):  # text between the end of the turn and the end of the block
        with pytest.raises(ValueError, match="would not learn to stop"):
            build([{"messages": talk}], tokenizer)
        return
    [example], _ = build([{"messages": talk}], tokenizer)
    ids, mask = reference(tokenizer, talk, chat)
    text_end = [i for i, bit in enumerate(mask) if bit and tokenizer.decode([ids[i]]).strip()]
    found = [i for i, label in enumerate(example.labels.tolist()) if label != -100]
    assert example.input_ids.tolist() == ids
    assert found[0] == mask.index(1)
    assert found[-1] == text_end[-1]


@pytest.mark.parametrize(
    "body",
    [
        "{% set turn %}<|im_start|>{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% endset %}"
        "{{ turn }}",
        "{{ '<|im_start|>' }}{% generation %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ '<|im_start|>' }}{% generation %}{{ m['content'] + '<|im_end|> ' }}{% endgeneration %}",
        "{{ '<|im_start|>' }}{% generation %}{{ m['content'] }}{% endgeneration %}{% generation %}<|im_end|>"
        "{% endgeneration %}",
    ],
    ids=["set block", "space first", "space last", "neighbours"],
)
def test_where_the_mask_of_transformers_is_wrong(make_tokenizer, build, talk, body):
    chat = "{% for m in messages %}{% if m['role'] == 'assistant' %}" + body
    tokenizer = make_tokenizer(chat + "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}", trim=True)
    [example], _ = build([{"messages": talk}], tokenizer)
    texts = [text.lstrip() for text in supervised(example, tokenizer)]
    assert texts == ["four!<|im_end|>", "the quick\n\nbrown fox<|im_end|>"]


def test_generation_blocks_that_the_template_alters(make_tokenizer, build, talk):
    chat = "{% set all %}{% for m in messages %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% endfor %}"
    tokenizer = make_tokenizer(chat + "{% endset %}{{ all | length }}</s>")
    with pytest.raises(ValueError, match="changes the output of its"):
        build([{"messages": talk}], tokenizer)


def test_a_template_that_rewrites_earlier_turns(make_tokenizer, build, talk):
    tokenizer = make_tokenizer("think")
    for message in talk[1::2]:
        message["content"] = "<think>ok</think>" + message["content"]
    with pytest.raises(ValueError, match=r"row 0: where the assistant turn in message 1 .* assistant_turns"):
        build([{"messages": talk}], tokenizer)
    [example], _ = build([{"messages": talk}], tokenizer, assistant_turns="last")
    assert supervised(example, tokenizer) == ["<think>ok</think>the quick\n\nbrown fox<|im_end|>"]
    [example], _ = build([{"messages": talk[:2]}], tokenizer)
    assert supervised(example, tokenizer) == ["<think>ok</think>four!<|im_end|>"]


def test_a_generation_prompt_that_the_answer_does_not_begin_with(make_tokenizer, template, build, talk):
    tokenizer = make_tokenizer(template("chatml") + "{% if add_generation_prompt %}<think>{% endif %}")
    with pytest.raises(ValueError, match="message 1 begins or ends cannot be told"):
        build([{"messages": talk}], tokenizer)
    talk[1]["content"], talk[3]["content"] = "<think>ok</think>four!", "<think>no</think>hello"
    [example], _ = build([{"messages": talk}], tokenizer)
    assert supervised(example, tokenizer) == ["ok</think>four!<|im_end|>", "no</think>hello<|im_end|>"]


def test_an_assistant_who_begins_needs_generation_blocks(make_tokenizer, template, build, talk):
    with pytest.raises(ValueError, match="message 0"):
        build([{"messages": talk[1:]}], make_tokenizer("chatml"))
    tokenizer = make_tokenizer(template("chatml", MARK, END))
    [example], _ = build([{"messages": talk[1:]}], tokenizer)
    assert supervised(example, tokenizer)[0] == "four!<|im_end|>"


def test_last_turn_only_with_generation_blocks(make_tokenizer, template, build, talk):
    tokenizer = make_tokenizer(template("chatml", MARK, END))
    [example], _ = build([{"messages": talk}], tokenizer, assistant_turns="last")
    assert supervised(example, tokenizer) == ["the quick\n\nbrown fox<|im_end|>"]
    once = "{% generation %}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}{% endgeneration %}"
    with pytest.raises(ValueError, match="1 generation blocks for 2 assistant turns"):
        build([{"messages": talk}], make_tokenizer(once), assistant_turns="last")


def test_a_turn_without_an_end_is_refused(make_tokenizer, template, build, talk):
    content_only = template("chatml").replace("{{ m['content'] + '<|im_end|>' }}{{ '\n' }}", "@")
    content_only = content_only.replace("@", MARK + "{{ m['content'] }}" + END + "{{ '<|im_end|>\n' }}")
    for chat in ("endless", content_only):
        with pytest.raises(ValueError, match=r"row 0: .*would not learn to stop"):
            build([{"messages": talk}], make_tokenizer(chat))


def test_eos_may_be_any_added_token(make_tokenizer, template, build, talk):
    tokenizer = make_tokenizer(template("chatml").replace("<|im_end|>", "<end>"))
    tokenizer.add_tokens(["<end>"])
    with pytest.raises(ValueError, match="knows that token as special"):
        build([{"messages": talk}], tokenizer)
    tokenizer.eos_token = "<end>"
    assert supervised(build([{"messages": talk}], tokenizer)[0][0], tokenizer)[0] == "four!<end>"


def test_sharegpt_names_and_extra_columns(make_tokenizer, build, talk):
    tokenizer = make_tokenizer("chatml")
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[message["role"]], "value": message["content"]} for message in talk]
    examples, _ = build([{"messages": talk, "id": 1}, {"conversations": turns, "text": None}], tokenizer)
    assert examples[0].labels.tolist() == examples[1].labels.tolist()


def test_tools_are_given_to_the_template(make_tokenizer, build, talk):
    tokenizer = make_tokenizer("tools")
    rows = [{"messages": talk, "tools": tools} for tools in ([{"name": "fox"}], '[{"name": "fox"}]')]
    for example in build(rows, tokenizer)[0]:
        assert tokenizer.decode(example.input_ids).startswith("fox;user:")


def test_conversational_prompt_and_completion(make_tokenizer, template, build, talk):
    for tags in [("", ""), (MARK, END)]:
        tokenizer = make_tokenizer(template("chatml", *tags))
        [example], _ = build([{"prompt": talk[:3], "completion": talk[3:]}], tokenizer)
        assert supervised(example, tokenizer) == ["the quick\n\nbrown fox<|im_end|>"]


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_and_completion_are_literal(make_tokenizer, build, bos):
    tokenizer = make_tokenizer("chatml", bos=bos)
    rows = [
        {"prompt": "what is two plus two?", "completion": " four!"},
        {"prompt": "what is two plus two? ", "completion": "four!"},  # " four" is one token of both
        {"prompt": "what is two", "completion": "</s>"},
    ]
    examples, audit = build(rows, tokenizer)
    assert [supervised(example, tokenizer) for example in examples] == [[" four!</s>"], [" four!</s>"], ["</s>"]]
    assert tokenizer.decode(examples[0].input_ids) == "<s>" * bos + "what is two plus two? four!</s>"
    assert audit.chat_template_sha256 is None


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_text_is_supervised_from_its_second_token(make_tokenizer, build, bos, trim):
    tokenizer = make_tokenizer(bos=bos, trim=trim)
    texts = ["the quick\u00e9 \U0001f98a fox  ", "<s>what is two</s>"]  # the other has its BOS and EOS already
    examples, _ = build([{"text": text} for text in texts], tokenizer)
    assert tokenizer.decode(examples[0].input_ids) == "<s>" * bos + texts[0] + "</s>"
    assert tokenizer.decode(examples[1].input_ids) == texts[1]
    for example in examples:
        assert example.labels.tolist() == [-100, *example.input_ids[1:].tolist()]


def test_a_template_file_replaces_the_tokenizers(make_tokenizer, template, build, talk, tmp_path: Path):
    file = tmp_path / "chat.jinja"
    file.write_text(template("llama3"))
    tokenizer = make_tokenizer("endless")
    [example], audit = build([{"messages": talk}], tokenizer, chat_template=str(file))
    assert supervised(example, tokenizer)[0] == "four!<|im_end|>"
    _, other = build([{"messages": talk}], make_tokenizer("llama3"))
    assert audit.chat_template_sha256 == other.chat_template_sha256
    with pytest.raises(ValueError, match="chat_template"):
        build([{"messages": talk}], tokenizer, chat_template=str(tmp_path / "none.jinja"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a", "answer": "b"}, r"columns question, answer; accepted are messages: .*text: a string"),
        ({"prompt": "a"}, "found the columns prompt"),
        ({"prompt": "a", "completion": []}, "two strings or two lists"),
        ({"text": 3}, "text must be a string, not int"),
        ({"messages": "hi"}, "list of messages, got str"),
        ({"messages": []}, "there are no messages"),
        ({"messages": ["hi"]}, "message 0 must have role and content"),
        ({"messages": [{"role": "asistant", "content": "hi"}]}, "role 'asistant'; known are system"),
        ({"messages": [{"role": "user", "content": None}]}, "message 0 has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "the chat template fails"),
    ],
)
def test_rows_that_cannot_be_read(make_tokenizer, build, talk, row, reason):
    with pytest.raises(ValueError, match=rf"rows.jsonl, row 1: .*{reason}.*\. It begins: "):
        build([{"messages": talk}, row], make_tokenizer("chatml"))


def test_tokenizers_that_lack_something(make_tokenizer, build, talk):
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="chat_template"):
        build([{"messages": talk}], tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        build([{"text": "hello"}], tokenizer)

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="fast tokenizer"):
        build([{"text": "hello"}], Slow())
