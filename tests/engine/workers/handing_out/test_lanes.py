"""Protects: every sequence is computed in one lane, and no lane is idle while another has more than its next sweeps."""

from __future__ import annotations

import random

from engine import Job
from engine.schedule.sequence import Sequence
from engine.workers.handing_out.lanes import LaneShares
from engine.workers.handing_out.sharing_out import Room


def sequences(count: int) -> list[Sequence]:
    dice = random.Random(count)
    return [
        Sequence.of(Job(prompt=[*range(100, 110), *(dice.randrange(9) for _ in range(6))], max_new_tokens=4))
        for _ in range(count)
    ]


def test_a_single_lane_gets_all_in_their_order() -> None:
    new = sequences(9)
    shares = LaneShares([Room(rows=1, jobs=1)], share_prefix=True)
    assert shares.share_out(new) == {0: new}
    assert {shares.lane_of(each) for each in new} == {0}


def test_each_goes_to_one_lane_as_lanes_have_room() -> None:
    new = sequences(40)
    shares = LaneShares([Room(rows=100, jobs=4)] * 3, share_prefix=True)
    given: dict[int, int] = {}
    sizes: list[int] = []
    waiting = shares.share_out(new)
    assert sorted(waiting) == [0, 1, 2]
    while waiting:
        sizes += [len(each) for each in waiting.values()]
        for lane, part in waiting.items():
            for sequence in part:
                assert given.setdefault(id(sequence), lane) == lane == shares.lane_of(sequence)
            shares.entered(part)
            for sequence in part:
                shares.left(sequence)
                assert shares.lane_of(sequence) is None
        waiting = shares.share_out([])
    assert given.keys() == set(map(id, new))
    assert sum(sizes) == 40
    assert max(sizes) <= 4
    counts = [list(given.values()).count(lane) for lane in range(3)]
    assert max(counts) - min(counts) <= 8


def test_what_nobody_waits_for_is_given_to_no_lane() -> None:
    new = sequences(8)
    shares = LaneShares([Room(rows=100, jobs=1)] * 2, share_prefix=True)
    first = [each for part in shares.share_out(new).values() for each in part]
    gone = [each for each in new if shares.lane_of(each) is None]
    assert len(first) + len(gone) == 8
    for each in gone:
        shares.left(each)
    shares.entered(first)
    assert shares.share_out([]) == {}
