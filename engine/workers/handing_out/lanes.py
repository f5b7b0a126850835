"""Which of the sweeps that are in flight at the same time a sequence is computed in (pure)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from engine.schedule.sequence import Sequence as Running
from engine.workers.handing_out.sharing_out import Room, SharingOut


class LaneShares:
    """Shares sequences out to lanes as jobs are to devices: by their prefixes, and kept until they are needed.

    A single lane gets all at once, in their order.
    """

    def __init__(self, rooms: Sequence[Room], *, share_prefix: bool) -> None:
        """rooms: of each lane, how much may wait there."""
        self._rooms = dict(enumerate(rooms))
        self._shares = SharingOut(len(rooms), share_prefix=share_prefix)
        self._numbers = itertools.count()
        self._known: dict[int, Running] = {}
        """By number; only of several lanes."""
        self._number_of: dict[int, int] = {}
        """Of sequences, by their identity."""
        self._lane_of: dict[int, int] = {}

    def share_out(self, new: Iterable[Running]) -> dict[int, list[Running]]:
        """Take in sequences; what each lane is to get now, of these and of those before."""
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
        """The lane that has got a sequence; None where none has."""
        return 0 if len(self._rooms) == 1 else self._lane_of.get(id(sequence))

    def entered(self, sequences: Iterable[Running]) -> None:
        """Take in that sequences are being computed."""
        self._shares.entered(number for each in sequences if (number := self._number_of.get(id(each))) is not None)

    def left(self, sequence: Running) -> None:
        """Forget a sequence."""
        number = self._number_of.pop(id(sequence), None)
        if number is not None:
            self._lane_of.pop(id(sequence), None)
            del self._known[number]
            self._shares.remove([number])
