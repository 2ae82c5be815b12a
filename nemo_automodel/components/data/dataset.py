"""From a source of rows to examples, with an account of what became of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_automodel.components.data.config import DataConfig
from nemo_automodel.components.data.examples import Examples
from nemo_automodel.components.data.rendering import Renderer
from nemo_automodel.components.data.sources import Row, load_rows
from nemo_automodel.components.data.tokenizing import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000  # rows in one call of the tokenizer, which works on them in parallel
_EXCERPT = 200  # characters of a row in an error


@dataclass
class Audit:
    """What became of the rows of one source. `dataclasses.asdict` makes it JSON.

    Attributes:
        source: name of the source, with its split.
        read: rows read.
        kept: examples made of them.
        truncated, split: rows longer than `max_length` that were cut off or made into several examples.
        dropped_overlong, dropped_unsupervised: rows that made no example.
        tokens, supervised_tokens: in the examples kept; the latter counts loss terms.
        longest: tokens in the longest row read, before any was cut or dropped.
        chat_template_sha256: the first 12 hex digits, if a chat template was used.
    """

    source: str
    read: int = 0
    kept: int = 0
    truncated: int = 0
    split: int = 0
    dropped_overlong: int = 0
    dropped_unsupervised: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    chat_template_sha256: str | None = None

    @property
    def dropped(self) -> int:
        """Rows that made no example."""
        return self.dropped_overlong + self.dropped_unsupervised

    def summary(self) -> str:
        """The account in one paragraph."""
        share = self.supervised_tokens / max(self.tokens, 1)
        template = f" Chat template {self.chat_template_sha256}." if self.chat_template_sha256 else ""
        return (
            f"{self.source}: {self.read:,} rows read, {self.kept:,} examples kept; {self.dropped:,} rows dropped "
            f"({self.dropped_overlong:,} too long, {self.dropped_unsupervised:,} with no supervised token), "
            f"{self.truncated:,} truncated, {self.split:,} split. {self.tokens:,} tokens, {self.supervised_tokens:,} "
            f"({share:.1%}) of them supervised; the longest row has {self.longest:,}.{template}"
        )


def build_dataset(
    source: str | Path, split: str | None, tokenizer: "PreTrainedTokenizerBase", config: DataConfig
) -> tuple[Examples, Audit]:
    """Load, render and tokenize all rows of a source.

    Args:
        source: as in `load_rows`.
        split: as in `load_rows`.
        tokenizer: a fast tokenizer of transformers.
        config: all but its sources, `packing` and `shuffle` is read.

    Returns:
        The examples, none longer than `max_length` and each with a supervised token, in the order of the rows; and the
        account of them.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: a row cannot be used (the message has its index, how it begins and the reason), or none is left.
    """
    rows = load_rows(source, split)
    builder = _Builder(tokenizer, config, f"{source} ({split})" if split else str(source))
    numbered = enumerate(islice(rows, config.limit))
    while chunk := list(islice(numbered, _CHUNK)):
        builder.add(chunk)
    audit = builder.audit
    if not audit.kept:
        raise ValueError(f"no example is left to train on. {audit.summary()}")
    return builder.examples, audit


class _Builder:
    """Fills the examples and the account of one source."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: DataConfig, source: str):
        self.examples, self.audit = Examples(), Audit(source)
        self._config = config
        self._renderer, self._encoder = Renderer(tokenizer, config), Encoder(tokenizer)

    def add(self, chunk: list[tuple[int, Row]]) -> None:
        """Add numbered rows."""
        rendered = []
        for index, row in chunk:
            with self._locate(index, row):
                rendered.append(self._renderer(row))
        all_ids, all_offsets = self._encoder.tokenize([one.text for one in rendered])
        for (index, _), one, ids, offsets in zip(chunk, rendered, all_ids, all_offsets, strict=True):
            with self._locate(index, one.text):
                self._add_tokens(one.kind, *self._encoder.supervise(one, ids, offsets))
        if any(one.kind == "chat" for one in rendered):
            self.audit.chat_template_sha256 = self._renderer.template_hash

    def _add_tokens(self, kind: str, ids: list[int], supervised: bytearray) -> None:
        """Keep the tokens of a row, or those parts of them that `overlong` and `unsupervised` leave."""
        audit, config = self.audit, self._config
        audit.read += 1
        audit.longest = max(audit.longest, len(ids))
        pieces = self._fit(kind, len(ids))
        if pieces and not any(1 in supervised[piece][1:] for piece in pieces):
            if config.unsupervised == "error":
                cut = f"what is supervised lies beyond max_length ({config.max_length})"
                reason = cut if 1 in supervised[1:] else "no assistant turn, or an empty answer or text"
                raise ValueError(f"no token is supervised: {reason}. data.unsupervised=drop leaves such rows out")
            audit.dropped_unsupervised += 1
            return
        for piece in pieces:
            self.examples.append(ids[piece], supervised[piece])
            audit.kept += 1
            audit.tokens += len(ids[piece])
            audit.supervised_tokens += supervised[piece].count(1, 1)

    def _fit(self, kind: str, length: int) -> list[slice]:
        """The parts of a row to keep, none longer than `max_length`."""
        limit, audit = self._config.max_length, self.audit
        if length <= limit:
            return [slice(length)]
        match self._config.overlong:
            case "drop":
                audit.dropped_overlong += 1
                return []
            case "truncate":
                audit.truncated += 1
                return [slice(limit)]
            case "split" if kind == "text":
                audit.split += 1
                # The last token of a piece is also the first of the next, for a first token is never predicted.
                return [slice(start, start + limit) for start in range(0, length - 1, limit - 1)]
        hint = "only text rows can be split" if self._config.overlong == "split" else "overlong says to stop"
        raise ValueError(f"it has {length} tokens, more than max_length ({limit}): {hint}")

    @contextmanager
    def _locate(self, index: int, row: Row | str) -> Iterator[None]:
        """Name the row in errors."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.audit.source}, row {index}: {error}. It begins: {str(row)[:_EXCERPT]}") from error
