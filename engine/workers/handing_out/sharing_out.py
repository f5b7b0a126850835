"""Decides which device computes which jobs; hands out group after group as devices need work (pure)."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from engine.job import Job
from engine.workers.handing_out.groups import Group, Load, groups_of


@dataclass(frozen=True, kw_only=True)
class Room:
    """How much work may wait at a device for its next sweeps."""

    rows: int
    """Most prompt tokens that may wait."""
    jobs: int


@dataclass(kw_only=True)
class _Held:
    """The jobs that one device has."""

    loads: dict[int, Load] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    """Jobs that the device has not begun to compute."""
    rows: int = 0
    """Prompt tokens of the waiting jobs."""
    tokens: int = 0
    """Tokens to compute for all its jobs, shared prefixes included."""
    families: Counter[int] = field(default_factory=Counter)
    """The number of its jobs in each family of groups."""


class SharingOut:
    """The jobs that no device has yet, and those that each device has.

    A group goes to the device with the least work left. The device gets only as much of it as it needs for its next
    sweeps; the rest stays here, reserved for that device, until another device runs out of work and takes half of the
    largest rest. A group larger than a fair share of all remaining work is cut; a group larger than a fair share of the
    work that no device has is divided when it is handed out.

    Built for a thousand devices and millions of jobs: each operation takes time proportional to the jobs it concerns,
    not to all that wait, except for one look at each device when new jobs arrive or a device runs out of work.
    """

    def __init__(self, num_places: int, *, share_prefix: bool = True) -> None:
        """Start with devices 0 to `num_places` - 1. `share_prefix`: whether devices compute a shared prefix once."""
        self._share_prefix = share_prefix
        self._held = {place: _Held() for place in range(num_places)}
        self._place_of: dict[int, int] = {}
        self._unsent: dict[int, Job] = {}
        self._ungrouped: dict[int, Job] = {}
        """Unsent jobs that were added since groups were last made."""
        self._loads: dict[int, Load] = {}
        """Loads of the unsent jobs that are in groups."""
        self._tokens = 0
        """Tokens to compute for all `_loads`."""
        self._groups: deque[Group] = deque()
        """Groups that no device has a part of; they may contain loads of jobs that were removed."""
        self._gone: set[int] = set()
        """Jobs that were removed while in groups; a group may still contain them."""
        self._newest = -1
        """The highest job number that has been in a group."""
        self._family_of: dict[int, int] = {}
        """The family of each job that a device has or that is in a group."""
        self._begun: dict[int, Group] = {}
        """For each device, the rest of the group that it has a part of."""

    def add(self, jobs: Mapping[int, Job]) -> None:
        """Add jobs, by number."""
        self._unsent.update(jobs)
        self._ungrouped.update(jobs)

    def join(self, place: int) -> None:
        """Add a device."""
        self._held[place] = _Held()

    def leave(self, place: int) -> None:
        """Remove a device, which must hold no jobs."""
        self.give_up(place)
        del self._held[place]

    @property
    def unsent(self) -> list[int]:
        """The numbers of the jobs that no device has, sorted."""
        return sorted(self._unsent)

    def held(self, place: int) -> Collection[int]:
        """The numbers of the jobs that a device has."""
        return self._held[place].loads.keys()

    def is_held(self, number: int) -> bool:
        """Whether a device has the job."""
        return number in self._place_of

    def tokens(self, place: int) -> int:
        """Tokens to compute for the jobs that a device has."""
        return self._held[place].tokens

    def hand_over(self, place: int, numbers: Iterable[int]) -> None:
        """Record that a device has these jobs now, whether or not they were unsent."""
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
        """Note that devices have begun to compute jobs."""
        for number in numbers:
            if number in self._place_of:
                self._enter(self._held[self._place_of[number]], number)

    def remove(self, numbers: Iterable[int]) -> None:
        """Forget jobs, whether or not a device has them."""
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
        """Make the rest of a device's group available to the other devices."""
        if (rest := self._begun.pop(place, None)) is not None:
            self._groups.appendleft(rest)

    def hand_out(self, rooms: Mapping[int, Room]) -> dict[int, list[int]]:
        """Assign jobs to each of these devices, in the order to compute them; they count as held by it from now on."""
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
                may_take = may_take and bool(self._held[place].waiting)  # else there is nothing to take from others
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
        """Remove a job from the unsent ones."""
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
        """Put the jobs that were added since the last call into groups."""
        jobs, self._ungrouped = self._ungrouped, {}
        if not jobs:
            return
        others = self._tokens + sum(held.tokens for held in self._held.values())
        groups = groups_of(jobs, len(self._held), others, share_prefix=self._share_prefix)
        if min(jobs) <= self._newest:  # these jobs come back from a device whose process has ended
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
        """Return the next group for a device, or None; `may_take`: it may take work reserved for another device."""
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
        """Return the part of a group that is a fair share for the device; the rest becomes available to others."""
        if len(rooms) < 2 or group.tokens <= self._tokens / len(rooms):
            return group
        total = sum(self.tokens(other) for other in rooms) + self._tokens + group.shared
        own, rest = group.split(_within((load.tokens for load in group.loads), total / len(rooms) - self.tokens(place)))
        if rest.tokens <= group.shared:  # the others would recompute more than this device saves
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
        """Return the group without removed jobs; None if no job is left."""
        if group is None or not self._gone:
            return group
        gone = [load.number for load in group.loads if load.number not in self._loads]
        if not gone:
            return group
        self._gone.difference_update(gone)
        group = group.only(self._loads)
        return group if group.loads else None


def _within(sizes: Iterable[int], most: float) -> int:
    """Return how many of the first `sizes` have a sum of at most `most`; at least 1."""
    total = count = 0
    for size in sizes:
        total += size
        if count and total > most:
            break
        count += 1
    return count
