"""One matrix of every expert of a layer: plain numbers, or codes that are decoded for some experts at a time."""

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
    """The most experts that may be taken at once; the first is a multiple of this number."""
    take: Callable[[int, int], torch.Tensor]
    """Returns matrices `[end - first, rows, columns]` of experts `first` to `end`; decoded ones stay valid until the
    next call."""
    expect: Callable[[list[tuple[int, int]]], None] | None = None
    """Announces which groups will be taken, before the first one is, so that the others are not fetched; None: all
    are there."""

    @classmethod
    def of(cls, numbers: torch.Tensor) -> Stack:
        """A stack of plain numbers `[experts, rows, columns]` in memory, with any strides."""
        return cls(numbers.shape, numbers.dtype, len(numbers), lambda first, end: numbers[first:end])

    @property
    def mT(self) -> Stack:
        """The transposed matrices."""
        experts, rows, columns = self.shape
        shape = torch.Size((experts, columns, rows))
        return Stack(shape, self.dtype, self.at_once, lambda first, end: self.take(first, end).mT, self.expect)

    def groups(self, counts: Sequence[int] | None = None) -> Iterator[tuple[int, int]]:
        """First and end of consecutive experts that may be taken at once, between multiples of `at_once`.

        counts: the number of rows of each expert, if known. Experts without rows are in a group only between others of
        it: each group is fetched, and decoded, once.
        """
        count = self.shape[0]
        for first in range(0, count, self.at_once):
            border = min(count, first + self.at_once)
            used = [expert for expert in range(first, border) if counts is None or counts[expert]]
            if used:
                yield used[0], used[-1] + 1
