"""One matrix of every expert of a layer: numbers in memory, or codes that are expanded for some experts at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Stack:
    """Matrices `[experts, rows, columns]` of one dtype."""

    shape: torch.Size
    dtype: torch.dtype
    at_once: int
    """How many experts may be taken at once, of which the first is a multiple of this."""
    take: Callable[[int, int], torch.Tensor]
    """Matrices `[end - first, rows, columns]` of experts `first` to `end`; of codes, until others are taken."""
    expect: Callable[[list[tuple[int, int]]], None] | None = None
    """Told which groups will be taken next, before the first is, saves bringing the others; None: all are there."""

    @classmethod
    def of(cls, numbers: torch.Tensor) -> Stack:
        """One that is in memory as numbers `[experts, rows, columns]`, with any strides."""
        return cls(numbers.shape, numbers.dtype, len(numbers), lambda first, end: numbers[first:end])

    @property
    def mT(self) -> Stack:
        """The transposed matrices."""
        experts, rows, columns = self.shape
        shape = torch.Size((experts, columns, rows))
        return Stack(shape, self.dtype, self.at_once, lambda first, end: self.take(first, end).mT, self.expect)

    def groups(self, counts: Sequence[int] | None = None) -> Iterator[tuple[int, int]]:
        """First and end of consecutive experts that may be taken at once, between multiples of `at_once`.

        counts: rows of each expert, as far as they are known; experts without rows are in a group only where they lie
        between others of it: each group is brought, and expanded, once.
        """
        count = self.shape[0]
        for first in range(0, count, self.at_once):
            border = min(count, first + self.at_once)
            used = [expert for expert in range(first, border) if counts is None or counts[expert]]
            if used:
                yield used[0], used[-1] + 1
