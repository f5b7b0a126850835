"""Drafts of coming tokens by prompt lookup among a sequence's own earlier tokens (pure)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

DRAFT_SIZES = (7, 3, 1)
"""The lengths of a draft; the longest that fits is used. There are few, so that few attention calls differ in shape."""
_NGRAM_SIZES = (2, 3)
"""The number of last tokens to look up; a longer match is a better guess and is tried first."""
_WIDTH = array("I").itemsize
"""The bytes of a token."""


class Drafter:
    """Prompt lookup (Saxena 2023): the tokens that followed the last occurrence of the last n tokens become the draft.

    Few-shot prompts repeat their patterns, and answers quote their questions, so the guess is often right; the model
    checks it, so a wrong one changes nothing.

    Nothing is indexed: one search backwards through the bytes of the tokens takes microseconds a step, where an index
    takes as long to build as hundreds of searches and 40 times the memory.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self._bytes = bytearray(array("I", tokens))

    def extend(self, tokens: Iterable[int]) -> None:
        """Append further tokens of the sequence."""
        self._bytes += array("I", tokens)

    def __len__(self) -> int:
        return len(self._bytes) // _WIDTH

    def draft(self, room: int) -> tuple[int, ...]:
        """At most `room` tokens that may come next; empty when the last tokens have not occurred before."""
        begin, end = 0, len(self) - 1  # what ends before the last token has one behind it
        for size in _NGRAM_SIZES:  # a longer match ends no later than the shorter one, which is its end
            found = self._end_of_last(size, end) if size <= end else None
            if found is None:
                break
            begin = end = found
        followed = array("I", bytes(self._bytes[begin * _WIDTH : (begin + DRAFT_SIZES[0]) * _WIDTH])) if begin else ()
        return tuple(followed[: next((size for size in DRAFT_SIZES if size <= min(room, len(followed))), 0)])

    def _end_of_last(self, size: int, end: int) -> int | None:
        """The end of the last occurrence of the last `size` tokens among the first `end` ones; None without one."""
        ngram = self._bytes[-size * _WIDTH :]
        at = self._bytes.rfind(ngram, 0, end * _WIDTH)
        while at > 0 and at % _WIDTH:  # bytes of neighbours that look like these tokens
            at = self._bytes.rfind(ngram, 0, at + len(ngram) - 1)
        return None if at < 0 else at // _WIDTH + size
