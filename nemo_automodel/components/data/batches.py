"""Examples as the tensors of one forward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_automodel.components.data.examples import IGNORED, Example

Batch = dict[str, Tensor]
_OPEN_ROWS = 64


def collate(examples: Sequence[Example], pad_token_id: int, multiple_of: int = 1, shortest: int = 1) -> Batch:
    """Pad examples on the right, to the longest of them, or `shortest`, rounded up to a `multiple_of`.

    Returns:
        `input_ids`, `attention_mask` (1 for tokens, 0 for padding) and `labels` (-100 for padding), each int64,
        `[examples, length]`. Padding is told by position, so a `pad_token_id` equal to EOS masks no real EOS.
    """
    longest = max(shortest, *map(len, examples))
    shape = len(examples), -(-longest // multiple_of) * multiple_of
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
    }
    for row, example in enumerate(examples):
        batch["input_ids"][row, : len(example)] = example.input_ids
        batch["attention_mask"][row, : len(example)] = 1
        batch["labels"][row, : len(example)] = example.labels
    return batch


def collate_packed(rows: Sequence[Sequence[Example]], length: int, pad_token_id: int) -> Batch:
    """Lay the examples of each row one behind the other.

    There is no attention mask: transformers reads from `position_ids` where documents begin, but only without a mask
    and without a cache (give its models `use_cache=False`).
    The padded end of a row is a document of its own. No document predicts the next, for first labels are -100.

    Returns:
        `input_ids`, `position_ids` (from 0 in each document) and `labels`, each int64, `[rows, length]`.

    Raises:
        ValueError: the examples of a row have more than `length` tokens.
    """
    shape = len(rows), length
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "position_ids": torch.empty(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
    }
    for row, examples in enumerate(rows):
        start = 0
        for example in examples:
            end = start + len(example)
            if end > length:
                raise ValueError(f"a row of {length} tokens cannot hold examples of {sum(map(len, examples))}")
            batch["input_ids"][row, start:end] = example.input_ids
            batch["position_ids"][row, start:end] = torch.arange(len(example))
            batch["labels"][row, start:end] = example.labels
            start = end
        batch["position_ids"][row, start:] = torch.arange(length - start)
    return batch


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Choose which documents share a row: first fit, over a bounded number of open rows.

    Returns:
        For each row the indices of its documents, whose `lengths` sum to at most `capacity`. Each index is in one row.

    Raises:
        ValueError: a document is longer than `capacity`.
    """
    rows: list[list[int]] = []
    still_open: list[tuple[list[int], int]] = []  # a row and the room that it has
    for index, length in enumerate(lengths):
        if length > capacity:
            raise ValueError(f"example {index} has {length} tokens, more than a row of {capacity}")
        for slot, (row, room) in enumerate(still_open):
            if length <= room:
                row.append(index)
                still_open[slot] = row, room - length
                break
        else:
            rows.append([index])
            still_open.append((rows[-1], capacity - length))
            if len(still_open) > _OPEN_ROWS:
                still_open.remove(min(still_open, key=lambda entry: entry[1]))
    return rows
