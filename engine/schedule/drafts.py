"""Drafts of coming tokens, looked up among a sequence's own earlier ones (pure)."""

from __future__ import annotations

from collections.abc import Iterable

DRAFT_SIZES = (7, 3, 1)
"""Lengths of a draft; the longest that fits is taken. Few, so that few attention calls differ in shape."""
_NGRAM_SIZES = (3, 2)
"""Tokens that must have been followed by the draft before; the longer match is the better guess."""


class Drafter:
    """Prompt lookup (Saxena 2023): what followed the last n tokens when they occurred last, is drafted to follow again.

    Few-shot prompts repeat their patterns, and answers quote their questions, so the guess is often right; the model
    checks it, so a wrong one changes nothing.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}
        """By n-gram: the position behind its last occurrence that something follows."""
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Take in further tokens of the sequence."""
        for token in tokens:
            end = len(self._tokens)
            for size in _NGRAM_SIZES:
                if end >= size:
                    self._followed[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def __len__(self) -> int:
        return len(self._tokens)

    def draft(self, room: int) -> tuple[int, ...]:
        """At most `room` tokens that may come next; none when the last tokens have not occurred before."""
        for size in _NGRAM_SIZES:
            begin = self._followed.get(tuple(self._tokens[-size:]))
            if begin is not None:
                found = self._tokens[begin : begin + DRAFT_SIZES[0]]
                return tuple(found[: next((size for size in DRAFT_SIZES if size <= min(room, len(found))), 0)])
        return ()
