"""An endless, resumable order of batches."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from nemo_automodel.components.data.batches import Batch, collate, collate_packed, pack
from nemo_automodel.components.data.examples import IGNORED, Example, Examples


class BatchStream:
    """Endless batches of examples, each given as the micro-batches that one rank computes.

    A batch is `batch_size` rows over all ranks: what one optimizer step is computed from. A row is an example, or with
    `packed_length` several of them. Each epoch has every row once, and ends with a smaller batch if need be. The order
    is a function of the seed and the epoch alone, and the position is counted in rows over all ranks, so a run may
    resume on another number of ranks, or with other micro-batches, and get the same batches.

    `next` returns a list of micro-batches as `collate` makes them, or `collate_packed`. All ranks get equally many, of
    equally many rows: a rank that would lack a row gets one without labels. So a micro-batch may have no
    supervised token: sum its loss and divide by the labels of the whole batch, for its own mean would be NaN.

    Args:
        examples: what `build_dataset` returns.
        batch_size: rows in a batch, over all ranks.
        micro_batch_size: the most rows in a micro-batch of one rank; None is all of its rows.
        pad_token_id: any token id will do: padding is neither attended to nor supervised.
        packed_length: tokens in a row of whole examples, or None to pad rows of one example.
        multiple_of: round the length of padded rows up to a multiple of this.
        alike: whether all micro-batches have one shape, that of the longest example, and all batches, the last one
            of an epoch included, equally many of them: rows without labels fill up.
        shuffle: whether epochs are in random order, or in that of `examples`.
        seed: of the random order.
        rank, world_size: which of how many data-parallel shares of each batch to return.

    Attributes:
        multiple_of: as said; another one is for the batches to come.

    Raises:
        ValueError: a size is not positive, `examples` is empty, an example is longer than `packed_length`, or that is
            no multiple of `multiple_of`.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        pad_token_id: int,
        micro_batch_size: int | None = None,
        packed_length: int | None = None,
        multiple_of: int = 1,
        alike: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        micro_batch_size = batch_size if micro_batch_size is None else micro_batch_size
        if min(len(examples), batch_size, micro_batch_size, multiple_of) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"cannot make batches of {batch_size} rows, micro-batches of {micro_batch_size}, lengths a multiple of "
                f"{multiple_of}, from {len(examples)} examples for rank {rank} of {world_size}"
            )
        if packed_length is not None and packed_length % multiple_of:
            raise ValueError(f"packed_length {packed_length} must be a multiple of {multiple_of}")
        self._examples, self._batch_size, self._micro_batch_size = examples, batch_size, micro_batch_size
        self._pad_token_id, self._packed_length, self.multiple_of = pad_token_id, packed_length, multiple_of
        self._rank, self._world_size = rank, world_size
        self._shortest, self._share = 1, 0
        if alike:
            self._shortest = max(map(examples.length, range(len(examples))))
            rows = min(micro_batch_size, -(-batch_size // world_size))
            self._share = rows * micro_batches(batch_size, micro_batch_size, world_size)
        self._packing = (
            None if packed_length is None else pack([examples.length(i) for i in range(len(examples))], packed_length)
        )
        self._rows = len(examples) if self._packing is None else len(self._packing)
        self._order: tuple[int, Tensor] | None = None
        self._epoch = self._cursor = 0
        # What the position depends on; the state has it too.
        self._identity = {
            "seed": seed,
            "shuffle": int(shuffle),
            "packed_length": packed_length or 0,
            "examples": len(examples),
            "fingerprint": examples.fingerprint(),
        }

    @property
    def epoch(self) -> int:
        """The epoch, from 0, that the next batch is of."""
        return self._epoch

    @property
    def rows_per_epoch(self) -> int:
        """Rows, over all ranks, in an epoch."""
        return self._rows

    @property
    def batches_per_epoch(self) -> int:
        """Batches, the last and maybe smaller one included, in an epoch."""
        return -(-self._rows // self._batch_size)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._order is None or self._order[0] != self._epoch:
            self._order = self._epoch, self._shuffle(self._epoch)
        rows = self._order[1][self._cursor : self._cursor + self._batch_size].tolist()
        self._cursor += len(rows)
        if self._cursor == self._rows:
            self._epoch, self._cursor = self._epoch + 1, 0
        return self._micro_batches(rows)

    def one_pass(self) -> Iterator[list[Batch]]:
        """Every row once, unshuffled, in batches like those of the stream, whose own position does not move."""
        for start in range(0, self._rows, self._batch_size):
            yield self._micro_batches(list(range(start, min(start + self._batch_size, self._rows))))

    def state_dict(self) -> dict[str, int]:
        """The position (`epoch`, and rows of it over all ranks as `cursor`) and what it is a position in."""
        return {"epoch": self._epoch, "cursor": self._cursor, **self._identity}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to the position that another stream saved.

        Raises:
            ValueError: the state is of other data, of another seed, order or packing, or has no such position.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise ValueError(
                    f"cannot resume: the data had {name} {state.get(name)} when the state was saved and has {value} "
                    "now. The rows, the tokenizer, max_length and the chat template must be the same (a template that "
                    "writes the date of today is not: give one that does not as chat_template)"
                )
        epoch, cursor = state["epoch"], state["cursor"]
        if epoch < 0 or not 0 <= cursor < self._rows:
            raise ValueError(f"cannot resume at row {cursor} of epoch {epoch}: an epoch has {self._rows} rows")
        self._epoch, self._cursor = epoch, cursor

    def _shuffle(self, epoch: int) -> Tensor:
        """The order of rows in an epoch, int64, `[rows]`."""
        if not self._identity["shuffle"]:
            return torch.arange(self._rows)
        digest = hashlib.sha256(f"{self._identity['seed']} {epoch}".encode()).digest()  # no two epochs share an order
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randperm(self._rows, generator=generator)

    def _micro_batches(self, rows: list[int]) -> list[Batch]:
        """This rank's share of a batch."""
        share = [self._read(row) for row in rows[self._rank :: self._world_size]]
        while len(share) * self._world_size < len(rows) or len(share) < self._share:
            share.append([Example(one.input_ids, torch.full_like(one.labels, IGNORED)) for one in self._read(rows[0])])
        size = self._micro_batch_size
        return [self._collate(share[start : start + size]) for start in range(0, len(share), size)]

    def _read(self, row: int) -> list[Example]:
        indices = [row] if self._packing is None else self._packing[row]
        return [self._examples[index] for index in indices]

    def _collate(self, rows: list[list[Example]]) -> Batch:
        if self._packed_length is not None:
            return collate_packed(rows, self._packed_length, self._pad_token_id)
        return collate([example for [example] in rows], self._pad_token_id, self.multiple_of, self._shortest)


def micro_batches(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """How many micro-batches each of the ranks has of a batch."""
    return -(-batch_size // (world_size * micro_batch_size))
