"""Decodes generated tokens: all of them, their end, and the number of tokens that spell a given beginning."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARGIN = 8
"""The number of characters at the beginning of a piece that may differ from the whole text, after its first token's."""
_BYTE = re.compile("<0x[0-9a-fA-F]{2}>")
"""A token that represents one byte of UTF-8."""
_LATER_BYTE = re.compile("<0x[89abAB][0-9a-fA-F]>")
"""Such a token that is not the first byte of its character."""
_MOST_LATER_BYTES = 3
"""The most bytes of a UTF-8 character after its first one."""


@dataclass(frozen=True)
class Text:
    """Turns tokens into text, and knows which tokens end it.

    The text of some tokens is not always a piece of the text of all: tokenizers drop the first space of a text, join
    words depending on what comes before them, and show an incomplete character as U+FFFD. Where single bytes are tokens
    (Llama 2, Mistral, Gemma), one missing byte turns the whole run of such tokens into U+FFFD.
    """

    tokenizer: PreTrainedTokenizerBase
    end_of_text: frozenset[int]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, special ones spelled out."""
        text = self.tokenizer.decode(list(tokens))
        assert isinstance(text, str)
        return text

    def tail(self, tokens: Sequence[int], first: int, size: int) -> str:
        """The end of the text of `tokens[first:]`: what the newest token added and `size` characters before it.

        The beginning of the result may differ from the whole text. Decoding all tokens at every step would take time
        quadratic in their number.
        """
        count = size + _MARGIN
        enough = count + len(self._name(tokens[-1]))  # a token's name is as long as its text, or longer
        while True:
            begin = self._between_characters(tokens, first, max(first, len(tokens) - count))
            tail = self.decode(tokens[begin:])
            if begin == first or len(tail) >= enough + len(self._name(tokens[begin])):
                return tail
            count *= 2

    def num_spelling(self, tokens: Sequence[int], written: str) -> int:
        """The number of `tokens`, whose text begins with `written`, that spell `written`; whole characters only.

        A spelling stays valid with each further whole character, so the number is found by bisection.
        """
        if not written:
            return 0

        def spells(count: int) -> bool:
            return self.decode(tokens[: self._between_characters(tokens, 0, count)]).startswith(written)

        counts = range(1, len(tokens))
        return self._between_characters(tokens, 0, 1 + bisect_left(counts, True, key=spells))

    def _between_characters(self, tokens: Sequence[int], first: int, place: int) -> int:
        """`place`, or the nearest earlier position that is not inside a character."""
        nearest = max(first, place - _MOST_LATER_BYTES)
        return next((at for at in range(place, nearest, -1) if not self._is_within_character(tokens, at)), nearest)

    def _is_within_character(self, tokens: Sequence[int], at: int) -> bool:
        return (
            at < len(tokens)
            and _LATER_BYTE.fullmatch(self._name(tokens[at])) is not None
            and _BYTE.fullmatch(self._name(tokens[at - 1])) is not None
        )

    def _name(self, token: int) -> str:
        """The vocabulary's name of a token; empty for an unknown token."""
        name = self.tokenizer.convert_ids_to_tokens(token)
        return name if isinstance(name, str) else ""
