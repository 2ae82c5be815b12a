"""Token ids with their labels, held compactly."""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not supervised


@dataclass(frozen=True)
class Example:
    """One document.

    Attributes:
        input_ids: int32, `[length]`.
        labels: int32, `[length]`: the token itself where it is supervised, else -100. They are not shifted. The first
            one is always -100, since nothing predicts the first token; so labels other than -100 count loss terms.
    """

    input_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


class Examples:
    """A list of examples in five bytes a token."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._supervised = bytearray()
        self._ends = array("q", [0])

    def append(self, ids: list[int], supervised: bytes | bytearray) -> None:
        """Add a document: its token ids and, of the same length, 1 for those to supervise, 0 for the others."""
        self._ids.extend(ids)
        self._supervised += b"\0" + supervised[1:]
        self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Example:
        """The example at `index`, from 0. Its `input_ids` are a view: an `append` while it lives is a BufferError."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start, count = self._ends[index], self.length(index)
        ids = torch.frombuffer(self._ids, dtype=torch.int32, count=count, offset=4 * start)
        supervised = torch.frombuffer(self._supervised, dtype=torch.bool, count=count, offset=start)
        return Example(ids, torch.where(supervised, ids, IGNORED))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def length(self, index: int) -> int:
        """Number of tokens of the example at `index`, from 0."""
        return self._ends[index + 1] - self._ends[index]

    def fingerprint(self) -> int:
        """A hash, 63 bits, of all token ids, labels and borders."""
        digest = hashlib.sha256(self._ids)
        digest.update(self._supervised)
        digest.update(self._ends)
        return int.from_bytes(digest.digest()[:8], "big") >> 1


def preview(example: Example, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text of an example, with ⟦ ⟧ around each run of supervised tokens."""
    runs = groupby(range(len(example)), key=lambda position: example.labels[position].item() != IGNORED)
    texts = []
    for supervised, positions in runs:
        text = str(tokenizer.decode(example.input_ids[list(positions)].tolist(), clean_up_tokenization_spaces=False))
        texts.append(f"⟦{text}⟧" if supervised else text)
    return "".join(texts)
