"""From rendered text to token ids, and which of them are supervised."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

from nemo_automodel.components.data.rendering import Rendered, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Offsets = Sequence[Span]
_BEGIN, _END = itemgetter(0), itemgetter(1)


class Encoder:
    """Tokenizes rendered rows and marks the tokens that their spans cover.

    A chat is tokenized as it is, for its template writes the special tokens, BOS included. Other text gets a BOS where
    the tokenizer would add one, and always an EOS; neither is doubled where the text has it already.

    Raises:
        ValueError: the tokenizer is not a fast one, so cannot tell which characters a token is made of.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} has no offsets: a fast tokenizer (tokenizer.json) is needed")
        self._tokenizer = tokenizer
        self._eos: int | None = tokenizer.eos_token_id
        added: list[int] = tokenizer("")["input_ids"]
        self._bos = added[:1] if added[:1] == [tokenizer.bos_token_id] else []
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._closers = special.union(tokenizer.all_special_ids)

    def tokenize(self, texts: list[str]) -> tuple[list[list[int]], list[Offsets]]:
        """Token ids of some texts, without added special tokens, and the characters `[start, end)` of each token."""
        encoded = self._tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        return encoded["input_ids"], encoded["offset_mapping"]

    def supervise(self, rendered: Rendered, ids: list[int], offsets: Offsets) -> tuple[list[int], bytearray]:
        """Complete the tokens of one row and tell which are supervised.

        Returns:
            The token ids and, of the same length, 1 for the supervised tokens and 0 for the others. A token that
            is partly in a span is supervised.

        Raises:
            ValueError: a supervised turn has no end, or the tokenizer has no EOS to end a text with.
        """
        supervised = bytearray(len(ids))
        for span in rendered.spans:
            first, last = _token_range(offsets, *span)
            supervised[first:last] = b"\1" * (last - first)
            if rendered.kind == "chat" and (first == last or ids[last - 1] not in self._closers):
                raise ValueError(
                    f"the assistant turn that ends in {rendered.text[slice(*span)][-20:]!r} has no special token at "
                    "its end, so the model would not learn to stop. Let the chat template end each assistant turn with "
                    "EOS or another special token (inside the {% generation %} block, if it has these), and check that "
                    "the tokenizer knows that token as special"
                )
        if rendered.kind == "chat":
            return ids, supervised
        if self._eos is None:
            raise ValueError("the tokenizer has no EOS token to end the text with: set its eos_token")
        if ids[-1:] != [self._eos]:
            supervised.append(any(supervised))  # an empty text does not become trainable by its end
            ids = [*ids, self._eos]
        if ids[:1] != self._bos:
            ids, supervised = [*self._bos, *ids], bytearray(len(self._bos)) + supervised
        return ids, supervised


def _token_range(offsets: Offsets, start: int, end: int) -> Span:
    """The tokens `[first, last)` that have some of the characters `[start, end)`."""
    first = bisect_right(offsets, start, key=_END)
    last = bisect_left(offsets, end, lo=first, key=_BEGIN)
    # Byte-level tokenizers may leave white space out of offsets, so that a token of it alone is empty, at its own end.
    while last < len(offsets) and offsets[last] == (end, end):
        last += 1
    return first, last
