"""Assigns sequences to lanes, the sweeps that are in flight at the same time (pure)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from engine.schedule.sequence import Sequence as Running
from engine.workers.handing_out.sharing_out import Room, SharingOut


class LaneShares:
    """Assigns sequences to lanes as jobs are assigned to devices: by shared prefix, and only when a lane needs them.

    A single lane gets every sequence at once, in order.
    """

    def __init__(self, rooms: Sequence[Room], *, share_prefix: bool) -> None:
        """rooms: how much may wait in each lane."""
        self._rooms = dict(enumerate(rooms))
        self._shares = SharingOut(len(rooms), share_prefix=share_prefix)
        self._numbers = itertools.count()
        self._known: dict[int, Running] = {}
        """Sequences by number; empty if there is only one lane."""
        self._number_of: dict[int, int] = {}
        """Numbers of sequences, by `id()`."""
        self._lane_of: dict[int, int] = {}

    def share_out(self, new: Iterable[Running]) -> dict[int, list[Running]]:
        """Add sequences; returns those that each lane gets now, new or left from earlier calls."""
        if len(self._rooms) == 1:
            return {0: list(new)}
        for sequence in new:
            number = next(self._numbers)
            self._known[number], self._number_of[id(sequence)] = sequence, number
            self._shares.add({number: sequence.job})
        given = {}
        for lane, numbers in self._shares.hand_out(self._rooms).items():
            given[lane] = [self._known[number] for number in numbers]
            self._lane_of.update((id(sequence), lane) for sequence in given[lane])
        return given

    def lane_of(self, sequence: Running) -> int | None:
        """The lane that a sequence was assigned to; None if it has not been assigned."""
        return 0 if len(self._rooms) == 1 else self._lane_of.get(id(sequence))

    def entered(self, sequences: Iterable[Running]) -> None:
        """Note that sequences are being computed."""
        self._shares.entered(number for each in sequences if (number := self._number_of.get(id(each))) is not None)

    def left(self, sequence: Running) -> None:
        """Forget a sequence."""
        number = self._number_of.pop(id(sequence), None)
        if number is not None:
            self._lane_of.pop(id(sequence), None)
            del self._known[number]
            self._shares.remove([number])
