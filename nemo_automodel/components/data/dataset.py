"""From a source of rows to examples, with an account of what became of them."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_automodel.components.data.config import DataConfig
from nemo_automodel.components.data.examples import Examples
from nemo_automodel.components.data.rendering import Rendered, Renderer, Span
from nemo_automodel.components.data.sources import load_rows

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
            f"({self.dropped_overlong:,} too long, {self.dropped_unsupervised:,} with nothing to learn), "
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
    for start in range(0, min(len(rows), config.limit or len(rows)), _CHUNK):
        chunk = islice(remaining, _CHUNK)
    return builder.finish()
