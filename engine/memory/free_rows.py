"""Allocates consecutive rows of a table that can grow (pure)."""

from __future__ import annotations

from bisect import insort


class FreeRows:
    """Free rows of a table of `capacity` rows; first fit."""

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self._free: list[tuple[int, int]] = [(0, capacity)] if capacity else []

    @property
    def num_free(self) -> int:
        """The number of free rows, which need not be consecutive."""
        return sum(end - first for first, end in self._free)

    def take(self, size: int) -> int | None:
        """Allocate `size` consecutive rows, and return the first; None when there are none."""
        for index, (first, end) in enumerate(self._free):
            if end - first >= size:
                if end - first == size:
                    del self._free[index]
                else:
                    self._free[index] = first + size, end
                return first
        return None

    def give(self, first: int, size: int) -> None:
        """Free rows that `take` allocated."""
        insort(self._free, (first, first + size))
        merged: list[tuple[int, int]] = []
        for first, end in self._free:
            if merged and merged[-1][1] == first:
                merged[-1] = merged[-1][0], end
            else:
                merged.append((first, end))
        self._free = merged

    def grow(self, capacity: int) -> None:
        """Add free rows up to `capacity`."""
        added = capacity - self.capacity
        self.give(self.capacity, added)
        self.capacity = capacity

    def tail_free(self) -> int:
        """The number of free rows at the end, which a growing table need not add."""
        return self._free[-1][1] - self._free[-1][0] if self._free and self._free[-1][1] == self.capacity else 0
