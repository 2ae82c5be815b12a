"""The order of batches: deterministic, resumable, the same for any number of ranks."""

import json
from itertools import chain, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_automodel.components.data import BatchStream, Examples

LENGTHS = [3, 5, 2, 7, 4, 6, 2, 3, 8, 5, 4]


def examples_of(lengths, first=1):
    examples = Examples()
    for length in lengths:
        examples.append(list(range(first, first + length)), b"\1" * length)
        first += length
    return examples


EXAMPLES = examples_of(LENGTHS)


def stream(examples=EXAMPLES, batch_size=4, **options):
    return BatchStream(examples, batch_size=batch_size, pad_token_id=0, **options)


def plain(batches):
    return [[{name: value.tolist() for name, value in micro.items()} for micro in batch] for batch in batches]


def labels(batches):
    """The supervised tokens of each batch, sorted."""
    return [
        sorted(token for micro in batch for token in micro["labels"].flatten().tolist() if token != -100)
        for batch in batches
    ]


EVERYTHING = sorted(chain.from_iterable(example.labels[1:].tolist() for example in EXAMPLES))
OPTIONS = {
    "batch_size": st.integers(1, 12),
    "micro_batch_size": st.none() | st.integers(1, 5),
    "packed_length": st.none() | st.integers(8, 20),
    "shuffle": st.booleans(),
    "seed": st.integers(0, 3),
}


@given(st.fixed_dictionaries(OPTIONS), st.integers(0, 12))
@settings(deadline=None)
def test_a_resumed_stream_goes_on_where_the_other_was(options, stop):
    whole = stream(**options)
    expected = plain(islice(whole, stop + 8))
    first = stream(**options)
    assert plain(islice(first, stop)) == expected[:stop]
    state = json.loads(json.dumps(first.state_dict()))
    assert all(type(value) is int for value in state.values())
    second = stream(**options)
    second.load_state_dict(state)
    assert plain(islice(second, 8)) == expected[stop:]
    assert second.state_dict() == whole.state_dict()


@given(st.fixed_dictionaries(OPTIONS))
@settings(deadline=None)
def test_an_epoch_has_everything_once(options):
    batches = stream(**options)
    for epoch in range(3):
        assert batches.epoch == epoch
        seen = labels(islice(batches, batches.batches_per_epoch))
        assert sorted(chain.from_iterable(seen)) == EVERYTHING


@given(st.fixed_dictionaries(OPTIONS), st.integers(1, 5), st.integers(1, 5), st.integers(0, 7))
@settings(deadline=None)
def test_any_number_of_ranks_sees_the_same_batches(options, before, after, stop):
    expected = labels(islice(stream(**options), stop + 6))
    states = []
    for world_size, skip, count in [(before, 0, stop), (after, stop, 6)]:
        shares = []
        for rank in range(world_size):
            share = stream(**options, rank=rank, world_size=world_size)
            if states:
                share.load_state_dict(states[rank % len(states)])
            shares.append(list(islice(share, count)))
            last = share.state_dict()
        together = [[micro for batch in batches for micro in batch] for batches in zip(*shares, strict=True)]
        assert labels(together) == expected[skip : skip + count]
        for batches in zip(*shares, strict=True):  # ranks compute in step
            assert len({tuple(len(micro["input_ids"]) for micro in batch) for batch in batches}) == 1
        states.append(last)


def test_micro_batches_are_bounded():
    [batch] = islice(stream(batch_size=11, micro_batch_size=2, world_size=2, rank=1), 1)
    assert [len(micro["input_ids"]) for micro in batch] == [2, 2, 2]
    assert (batch[-1]["labels"][-1] == -100).all()  # 11 rows on 2 ranks: rank 1 fills up
    [batch] = islice(stream(batch_size=1, world_size=2, rank=1, packed_length=16), 1)
    assert (batch[0]["labels"] == -100).all()


def test_the_order_is_of_seed_and_epoch():
    def epochs(**options):
        batches = stream(batch_size=11, **options)
        return [batch[0]["input_ids"][:, 0].tolist() for batch in islice(batches, 3)]

    one, two, three = epochs(seed=0)
    assert one != two != three != one
    assert epochs(seed=0) == [one, two, three]
    assert not any(order in epochs(seed=1) for order in (one, two, three))
    assert epochs(shuffle=False) == [[example.input_ids[0].item() for example in EXAMPLES]] * 3


def test_one_pass_leaves_the_stream_alone():
    batches = stream(multiple_of=4)
    next(batches)
    state = batches.state_dict()
    once = list(batches.one_pass())
    assert batches.state_dict() == state
    assert list(chain.from_iterable(labels(once))) == EVERYTHING
    assert [micro["input_ids"].shape for [micro] in once] == [(4, 8), (4, 8), (3, 8)]
    packed = stream(packed_length=10)
    assert sorted(chain.from_iterable(labels(packed.one_pass()))) == EVERYTHING
    assert packed.rows_per_epoch < len(EXAMPLES)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("seed", {"seed": 1}),
        ("shuffle", {"shuffle": False}),
        ("packed_length", {"packed_length": 16}),
        ("examples", {"examples": examples_of(LENGTHS[:-1])}),
        ("fingerprint", {"examples": examples_of(LENGTHS, first=2)}),
    ],
)
def test_another_stream_cannot_take_the_state(name, options):
    with pytest.raises(ValueError, match=f"cannot resume: the data had {name} "):
        stream(**options).load_state_dict(stream().state_dict())


def test_positions_that_do_not_exist():
    for wrong in ({"cursor": len(EXAMPLES)}, {"cursor": -1}, {"epoch": -1}):
        with pytest.raises(ValueError, match="cannot resume at row"):
            stream().load_state_dict({**stream().state_dict(), **wrong})


@pytest.mark.parametrize(
    "options",
    [
        {"examples": Examples()},
        {"batch_size": 0},
        {"micro_batch_size": 0},
        {"multiple_of": 0},
        {"rank": 1},
        {"packed_length": 10, "multiple_of": 4},
        {"packed_length": 7},
    ],
)
def test_bad_sizes(options):
    with pytest.raises(ValueError, match=r"cannot make batches|multiple of|more than a row"):
        stream(**options)
