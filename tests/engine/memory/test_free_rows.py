"""Protects: rows of a table are handed out once, come back whole, and join their neighbours again."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.memory.free_rows import FreeRows


class Rows(RuleBasedStateMachine):
    """FreeRows beside a plain list of rows, each free or not."""

    @initialize(capacity=st.integers(0, 40))
    def begin(self, capacity: int) -> None:
        self.extents = FreeRows(capacity)
        self.is_free = [True] * capacity
        self.taken: list[tuple[int, int]] = []

    @rule(size=st.integers(1, 12))
    def take(self, size: int) -> None:
        runs = "".join("." if free else "#" for free in self.is_free)
        first = self.extents.take(size)
        assert first == (runs.find("." * size) if "." * size in runs else None)  # first fit
        if first is not None:
            self.is_free[first : first + size] = [False] * size
            self.taken.append((first, size))

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        first, size = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.extents.give(first, size)
        self.is_free[first : first + size] = [True] * size

    @rule(more=st.integers(1, 20))
    def grow(self, more: int) -> None:
        self.extents.grow(len(self.is_free) + more)
        self.is_free += [True] * more

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "extents"):
            return
        assert self.extents.capacity == len(self.is_free)
        assert self.extents.num_free == sum(self.is_free)
        tail = len(self.is_free) - len("".join("." if free else "#" for free in self.is_free).rstrip("."))
        assert self.extents.tail_free() == tail


TestRows = Rows.TestCase
TestRows.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_all_rows_are_one_piece_again_after_everything_came_back() -> None:
    rng, extents = random.Random(0), FreeRows(1000)
    taken = []
    while (size := rng.randrange(1, 30)) and (first := extents.take(size)) is not None:
        taken.append((first, size))
    rng.shuffle(taken)
    for first, size in taken:
        extents.give(first, size)
    assert extents.take(1000) == 0
