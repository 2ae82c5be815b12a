"""The quickstart data: disjoint splits, determinism, valid records and exact-match scoring."""

import json
import re
from typing import Any

import pytest

from nemo_automodel.recipes.quickstart_data import (
    DAYS,
    FIELDS,
    HELDOUT,
    NUMBER_WORDS,
    QUANTITY_IDIOMS,
    TRAIN,
    exact_match,
    heldout_examples,
    plural,
    train_examples,
)

REFERENCE = '{"name":"Ann","item":"mug","quantity":1,"colour":null,"day":"Friday"}'


def _record(row: dict[str, Any]) -> dict[str, Any]:
    return json.loads(row["messages"][-1]["content"])


@pytest.mark.parametrize("key", sorted(TRAIN))
def test_no_phrasing_or_value_is_in_both_splits(key: str) -> None:
    train, heldout = TRAIN[key], HELDOUT[key]
    assert len(set(train)) == len(train)
    assert len(set(heldout)) == len(heldout)
    assert not set(train) & set(heldout)


def test_templates_are_many_and_names_do_not_clash_with_other_peoples() -> None:
    assert len(TRAIN["templates"]) >= 40
    assert len(HELDOUT["templates"]) >= 12
    people = [*TRAIN["names"], *TRAIN["others"], *HELDOUT["names"], *HELDOUT["others"]]
    assert len(set(people)) == len(people)


def test_item_words_of_the_splits_differ() -> None:
    words = [{word for item in split["items"] for word in item.split()} for split in (TRAIN, HELDOUT)]
    assert not words[0] & words[1]


def test_generated_records_share_no_name_item_or_colour() -> None:
    train, heldout = train_examples(1500, 3), heldout_examples(500, 3)
    for field in ("name", "item", "colour"):
        values = [{_record(row)[field] for row in rows} - {None} for rows in (train, heldout)]
        assert not values[0] & values[1], field
    shared = {_record(row)["quantity"] for row in train} & {_record(row)["quantity"] for row in heldout}
    assert shared == {value for _, _, value in QUANTITY_IDIOMS}


@pytest.mark.parametrize("make", [train_examples, heldout_examples])
def test_examples_are_deterministic_and_distinct(make: Any) -> None:
    rows = make(300, 1)
    assert rows == make(300, 1)
    assert rows != make(300, 2)
    assert len(rows) == len({row["messages"][1]["content"] for row in rows}) == 300
    assert make(0, 1) == []


@pytest.mark.parametrize(("make", "split"), [(train_examples, TRAIN), (heldout_examples, HELDOUT)])
def test_records_are_compact_json_that_the_message_supports(make: Any, split: dict[str, tuple[Any, ...]]) -> None:
    for row in make(400, 5):
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        text, answer = row["messages"][1]["content"], row["messages"][2]["content"]
        record = _record(row)
        assert answer == json.dumps(record, separators=(",", ":"))
        assert exact_match(answer, answer)
        assert tuple(record) == FIELDS
        assert record["name"] in split["names"]
        assert record["item"] in split["items"] or record["item"] in map(plural, split["items"])
        assert record["day"] in DAYS
        assert record["colour"] is None or record["colour"] in split["colours"]
        lower = text.lower()
        assert "{" not in text
        assert record["name"] in text
        assert record["day"] in text
        assert record["item"] in lower
        assert record["colour"] is None or record["colour"] in lower
        quantity = record["quantity"]
        spellings = [
            NUMBER_WORDS[quantity],
            str(quantity),
            *(words for _, words, n in QUANTITY_IDIOMS if n == quantity),
        ]
        assert re.search(rf"\b(?:{'|'.join(spellings)})\b", lower), text
        assert not re.search(r"(?:^|[.?!] )[a-z]", text), text


@pytest.mark.parametrize(
    ("item", "expected"),
    [("mug", "mugs"), ("lunch box", "lunch boxes"), ("bench", "benches"), ("bread knife", "bread knives")],
)
def test_plural(item: str, expected: str) -> None:
    assert plural(item) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (REFERENCE, True),
        (f"  {REFERENCE}\n", True),
        ('{"day": "Friday", "colour": null, "quantity": 1, "item": "mug", "name": "Ann"}', True),
        (REFERENCE.replace("Ann", "ann"), False),
        (REFERENCE.replace(":1,", ':"1",'), False),
        (REFERENCE.replace(":1,", ":1.0,"), False),
        (REFERENCE.replace(":1,", ":true,"), False),
        (REFERENCE.replace("null", '"null"'), False),
        (REFERENCE.replace('"colour":null,', ""), False),
        (REFERENCE.replace("}", ',"note":null}'), False),
        (f"[{REFERENCE}]", False),
        (f"Sure! {REFERENCE}", False),
        (f"{REFERENCE} {REFERENCE}", False),
        (REFERENCE[:-1], False),
        ("", False),
        ("null", False),
        ("[" * 100_000, False),
    ],
)
def test_exact_match(prediction: str, expected: bool) -> None:
    assert exact_match(prediction, REFERENCE) is expected


def test_exact_match_needs_a_record_as_reference_too() -> None:
    assert not exact_match("null", "null")
    assert not exact_match(REFERENCE, "not JSON")
