"""Which device computes which jobs: handed out group by group, as devices need work (pure)."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from engine.job import Job
from engine.workers.handing_out.groups import Group, Load, groups_of


@dataclass(frozen=True, kw_only=True)
class Room:
    """How much may wait at a device for its next sweeps."""

    rows: int
    """Tokens of prompts."""
    jobs: int


@dataclass(kw_only=True)
class _Held:
    """What a device has."""

    loads: dict[int, Load] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    """Those that it has not begun to compute."""
    rows: int = 0
    """Of those that wait."""
    tokens: int = 0
    """Of all, and of what they begin with."""
    families: Counter[int] = field(default_factory=Counter)
    """Of the groups that they are of, with the number of jobs of each."""


class SharingOut:
    """Jobs that no device has, and what each device has of them.

    A group goes to the device that has least to compute. A device gets no more of it than it needs for its next sweeps;
    the rest stays here, its own, until another device has nothing left: that one takes half of the largest rest. A
    group that is larger than a fair share of all that is left is cut, and one that is larger than a fair share of what
    no device has is divided when it is handed out.

    Made for a thousand devices and millions of jobs: what it does takes time by the jobs that it is about, not by all
    that wait, but for a look at each device where new jobs come and where one has run dry.
    """

    def __init__(self, num_places: int, *, share_prefix: bool = True) -> None:
        """`num_places`: devices, by number, at first. `share_prefix`: whether devices compute a shared prefix once."""
        self._share_prefix = share_prefix
        self._held = {place: _Held() for place in range(num_places)}
        self._place_of: dict[int, int] = {}
        self._unsent: dict[int, Job] = {}
        self._ungrouped: dict[int, Job] = {}
        """Of those, the ones that have come since groups were made."""
        self._loads: dict[int, Load] = {}
        """Of jobs among the unsent that are in groups."""
        self._tokens = 0
        """Of those."""
        self._groups: deque[Group] = deque()
        """With loads of jobs that may be gone."""
        self._gone: set[int] = set()
        """Jobs that were forgotten while they were in groups, which may still have them."""
        self._newest = -1
        """The highest number of a job that has been in a group."""
        self._family_of: dict[int, int] = {}
        """Of jobs that devices have, and of those in groups."""
        self._begun: dict[int, Group] = {}
        """The rest of a group that a device has a part of."""

    def add(self, jobs: Mapping[int, Job]) -> None:
        """Take in jobs, by number."""
        self._unsent.update(jobs)
        self._ungrouped.update(jobs)

    def join(self, place: int) -> None:
        """Take in that there is another device."""
        self._held[place] = _Held()

    def leave(self, place: int) -> None:
        """Take in that a device, which has nothing any more, gets nothing more."""
        self.give_up(place)
        del self._held[place]

    @property
    def unsent(self) -> list[int]:
        """Every job that no device has, in the order of their numbers."""
        return sorted(self._unsent)

    def held(self, place: int) -> Collection[int]:
        """The jobs that a device has."""
        return self._held[place].loads.keys()

    def is_held(self, number: int) -> bool:
        """Whether a device has a job."""
        return number in self._place_of

    def tokens(self, place: int) -> int:
        """Computed tokens of the jobs that a device has."""
        return self._held[place].tokens

    def hand_over(self, place: int, numbers: Iterable[int]) -> None:
        """Take in that a device has jobs now that need not have come from here."""
        held = self._held[place]
        for number in numbers:
            load = self._take(number) or Load(number=number, rows=0, new=0)
            self._place_of[number] = place
            held.loads[number] = load
            held.waiting.add(number)
            held.rows += load.rows
            held.tokens += load.tokens
            held.families[self._family_of.get(number, number)] += 1

    def entered(self, numbers: Iterable[int]) -> None:
        """Take in that devices have begun to compute jobs."""
        for number in numbers:
            if number in self._place_of:
                self._enter(self._held[self._place_of[number]], number)

    def remove(self, numbers: Iterable[int]) -> None:
        """Forget jobs, wherever they are."""
        for number in numbers:
            if self._take(number) is not None:
                self._gone.add(number)
            place = self._place_of.pop(number, None)
            if place is not None:
                held = self._held[place]
                self._enter(held, number)
                held.tokens -= held.loads.pop(number).tokens
                family = self._family_of.get(number, number)
                held.families[family] -= 1
                if not held.families[family]:
                    del held.families[family]
            self._family_of.pop(number, None)

    def give_up(self, place: int) -> None:
        """Let others take the rest of the group that a device has a part of."""
        if (rest := self._begun.pop(place, None)) is not None:
            self._groups.appendleft(rest)

    def hand_out(self, rooms: Mapping[int, Room]) -> dict[int, list[int]]:
        """What each of these devices is to get now, in the order to compute it in; it has that from now on."""
        self._make_groups()
        given: dict[int, list[int]] = {}
        hungry = [(self.tokens(place), place) for place in rooms]
        heapq.heapify(hungry)
        may_take = True
        while hungry:
            _, place = heapq.heappop(hungry)
            if not self._has_room(place, rooms[place]):
                continue
            part = self._next(place, rooms, may_take=may_take)
            if part is None:
                may_take = may_take and bool(self._held[place].waiting)  # else it has found nothing that may be taken
                continue
            numbers = [load.number for load in part.loads]
            again = part.inherited if part.family not in self._held[place].families else 0
            if again:
                first = part.loads[0]
                self._loads[first.number] = replace(first, rows=first.rows + again)
                self._tokens += again
            self.hand_over(place, numbers)
            given.setdefault(place, []).extend(numbers)
            heapq.heappush(hungry, (self.tokens(place), place))
        return given

    def _take(self, number: int) -> Load | None:
        """Let a job be no longer among those that no device has."""
        self._unsent.pop(number, None)
        self._ungrouped.pop(number, None)
        load = self._loads.pop(number, None)
        self._tokens -= 0 if load is None else load.tokens
        return load

    @staticmethod
    def _enter(held: _Held, number: int) -> None:
        if number in held.waiting:
            held.waiting.discard(number)
            held.rows -= held.loads[number].rows

    def _make_groups(self) -> None:
        """Put what has come since the last time into groups."""
        jobs, self._ungrouped = self._ungrouped, {}
        if not jobs:
            return
        others = self._tokens + sum(held.tokens for held in self._held.values())
        groups = groups_of(jobs, len(self._held), others, share_prefix=self._share_prefix)
        if min(jobs) <= self._newest:  # some device had them, and has ended
            self._groups.extendleft(reversed(groups))
        else:
            self._groups.extend(groups)
        self._newest = max(self._newest, max(jobs))
        for group in groups:
            self._loads.update((load.number, load) for load in group.loads)
            self._family_of.update((load.number, group.family) for load in group.loads)
            self._tokens += group.tokens

    def _has_room(self, place: int, room: Room) -> bool:
        held = self._held[place]
        return held.rows < room.rows and len(held.waiting) < room.jobs

    def _next(self, place: int, rooms: Mapping[int, Room], *, may_take: bool) -> Group | None:
        """What a device gets next; None where nothing is left for it, that of others included where it `may_take`."""
        group = self._live(self._begun.pop(place, None))
        while group is None and self._groups:
            group = self._live(self._groups.popleft())
        if group is None and may_take and not self._held[place].waiting:
            group = self._half_of_the_largest_rest()
        if group is None:
            return None
        group, room, held = self._fair_part(place, group, rooms), rooms[place], self._held[place]
        fitting = _within((load.rows for load in group.loads), room.rows - held.rows)
        part, rest = group.split(max(1, min(fitting, room.jobs - len(held.waiting))))
        if rest.loads:
            self._begun[place] = rest
        return part

    def _fair_part(self, place: int, group: Group, rooms: Mapping[int, Room]) -> Group:
        """What a device should get of a group; the others may take the rest at once."""
        if len(rooms) < 2 or group.tokens <= self._tokens / len(rooms):
            return group
        total = sum(self.tokens(other) for other in rooms) + self._tokens + group.shared
        own, rest = group.split(_within((load.tokens for load in group.loads), total / len(rooms) - self.tokens(place)))
        if rest.tokens <= group.shared:  # it would cost another device more than it spares this one
            return group
        self._groups.appendleft(rest)
        return own

    def _half_of_the_largest_rest(self) -> Group | None:
        if self._gone:
            self._begun = {place: live for place, rest in self._begun.items() if (live := self._live(rest)) is not None}
        owner = max(self._begun, key=lambda place: self._begun[place].tokens, default=None)
        if owner is None:
            return None
        rest = self._begun[owner]
        kept, taken = rest.split(_within((load.tokens for load in rest.loads), rest.tokens / 2))
        if taken.tokens <= rest.shared:
            return None
        self._begun[owner] = kept
        return taken

    def _live(self, group: Group | None) -> Group | None:
        """A group without jobs that are gone; None where none is left."""
        if group is None or not self._gone:
            return group
        gone = [load.number for load in group.loads if load.number not in self._loads]
        if not gone:
            return group
        self._gone.difference_update(gone)
        group = group.only(self._loads)
        return group if group.loads else None


def _within(sizes: Iterable[int], most: float) -> int:
    """How many of `sizes`, from the first one on, come to at most `most`; at least one."""
    total = count = 0
    for size in sizes:
        total += size
        if count and total > most:
            break
        count += 1
    return count
