"""Protects: jobs are shared out among devices once each, evenly, and with their prefixes."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.job import Job
from engine.workers.handing_out.groups import groups_of
from engine.workers.handing_out.sharing_out import Room, SharingOut

WIDE = Room(rows=10**9, jobs=10**9)


def job(*prompt: int, new: int = 1) -> Job:
    return Job(prompt=prompt, max_new_tokens=new)


def suite(groups: int, jobs: int, shared: int, own: int, seed: int = 0) -> dict[int, Job]:
    """`groups` prefixes of `shared` tokens, `jobs` prompts each, in the order of a suite's runs."""
    dice = random.Random(seed)
    prefixes = [[dice.randrange(1000) for _ in range(shared)] for _ in range(groups)]
    made = [job(*prefix, *(dice.randrange(1000) for _ in range(own))) for prefix in prefixes for _ in range(jobs)]
    return dict(enumerate(made))


def nodes(jobs: list[Job]) -> int:
    """Computed tokens of jobs that share all that they have in common: the nodes of the tree of their prompts."""
    return len({tuple(each.prompt[:end]) for each in jobs for end in range(1, len(each.prompt) + 1)})


def swept(jobs: dict[int, Job], num_places: int, room: Room, at_once: int = 4) -> dict[int, list[int]]:
    """What equal devices have computed at the end: who has done least tokens so far is the next to have a sweep."""
    shares = SharingOut(num_places)
    shares.add(jobs)
    rooms = dict.fromkeys(range(num_places), room)
    waiting: dict[int, list[int]] = {place: [] for place in rooms}
    done: dict[int, list[int]] = {place: [] for place in rooms}
    clock = dict.fromkeys(rooms, 0)
    while True:
        for place, numbers in shares.hand_out(rooms).items():
            waiting[place] += numbers
        busy = [place for place in rooms if waiting[place]]
        if not busy:
            return done
        place = min(busy, key=lambda place: clock[place])
        sweep, waiting[place] = waiting[place][:at_once], waiting[place][at_once:]
        shares.entered(sweep)
        shares.remove(sweep)
        clock[place] += nodes([jobs[number] for number in sweep])
        done[place] += sweep


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40).map(lambda p: [7] * 20 * (p[0] == 0) + p))


@given(PROMPTS, st.integers(1, 4), st.integers(1, 100), st.integers(1, 9), st.integers(1, 5))
def test_every_job_is_handed_out_once(
    prompts: list[list[int]], num_places: int, rows: int, most_jobs: int, at_once: int
) -> None:
    jobs = {number: job(*prompt) for number, prompt in enumerate(prompts)}
    done = swept(jobs, num_places, Room(rows=rows, jobs=most_jobs), at_once)
    assert Counter(number for numbers in done.values() for number in numbers) == Counter(list(jobs))


@given(PROMPTS.filter(len), st.integers(2, 4), st.data())
def test_nothing_is_lost_when_devices_die_and_calls_are_dropped(
    prompts: list[list[int]], num_places: int, data: st.DataObject
) -> None:
    jobs = {number: job(*prompt) for number, prompt in enumerate(prompts)}
    shares, left = SharingOut(num_places), set(jobs)
    shares.add(jobs)
    for _ in range(200):
        if not left:
            break
        places = data.draw(st.sets(st.integers(0, num_places - 1), min_size=1))
        given_out = shares.hand_out(dict.fromkeys(places, Room(rows=60, jobs=3)))
        for place, numbers in given_out.items():
            assert set(numbers) <= set(shares.held(place)) & left
        place = data.draw(st.integers(0, num_places - 1))
        had = list(shares.held(place))
        what = data.draw(st.sampled_from(["answers", "dies", "is dropped"]))
        if what == "answers":
            shares.remove(had)
            left -= set(had)
        elif what == "dies":
            shares.remove(had)
            shares.give_up(place)
            shares.add({number: jobs[number] for number in had})
        else:
            gone = data.draw(st.sets(st.sampled_from(sorted(left)), max_size=2))
            shares.remove(gone)
            left -= gone
        everywhere = Counter(shares.unsent)
        for each in range(num_places):
            everywhere.update(shares.held(each))
            assert shares.tokens(each) >= 0
        assert everywhere == Counter(left)


@pytest.mark.parametrize("num_places", [2, 3, 8])
@pytest.mark.parametrize("room", [WIDE, Room(rows=3000, jobs=200)])
def test_equal_devices_compute_as_much(num_places: int, room: Room) -> None:
    """Of many small groups, within 5 %; counted as nodes of a tree of prompts, which is not how they are shared out."""
    jobs = suite(groups=240, jobs=6, shared=60, own=15)
    done = swept(jobs, num_places, room, at_once=30)
    tokens = [nodes([jobs[number] for number in numbers]) for numbers in done.values()]
    assert max(tokens) <= 1.05 * sum(tokens) / num_places
    assert sum(tokens) <= 1.02 * nodes(list(jobs.values()))  # hardly any prefix is computed twice


def test_a_group_stays_together_unless_it_is_larger_than_a_fair_share() -> None:
    jobs = suite(groups=20, jobs=10, shared=100, own=10)
    done = swept(jobs, 4, WIDE)
    for first in range(0, 200, 10):
        places = {place for place, numbers in done.items() if set(range(first, first + 10)) & set(numbers)}
        assert len(places) == 1
    one = suite(groups=1, jobs=100, shared=100, own=10)
    done = swept(one, 4, WIDE)
    assert [len(numbers) for numbers in done.values()] == [25, 25, 25, 25]


def test_three_equal_groups_are_no_reason_for_one_of_two_devices_to_wait() -> None:
    jobs = suite(groups=3, jobs=100, shared=50, own=10)
    tokens = [nodes([jobs[number] for number in numbers]) for numbers in swept(jobs, 2, WIDE).values()]
    assert max(tokens) <= 1.05 * (3 * 1050 + 50) / 2


def test_a_prefix_that_outweighs_its_jobs_is_not_computed_twice() -> None:
    jobs = suite(groups=1, jobs=2, shared=5000, own=1)
    assert sorted(map(len, swept(jobs, 2, WIDE).values())) == [0, 2]


def test_whoever_runs_dry_takes_half_of_the_largest_rest() -> None:
    """A device is given a part of a group; another takes all other groups, then half of what is not given out."""
    jobs = suite(groups=3, jobs=100, shared=100, own=10)
    shares = SharingOut(2)
    shares.add(jobs)
    small = Room(rows=250, jobs=100)
    first = shares.hand_out({0: small})[0]
    assert 10 <= len(first) <= 20
    second = shares.hand_out({0: small, 1: WIDE})[1]
    assert len(second) == 200
    assert shares.hand_out({0: small, 1: WIDE}) == {}  # it has not run dry
    shares.entered(second)
    third = shares.hand_out({0: small, 1: WIDE})[1]
    assert abs(len(third) - (100 - len(first)) / 2) <= 1
    assert sorted([*first, *second, *third, *shares.unsent]) == list(range(300))


def test_neighbours_in_a_group_have_most_in_common() -> None:
    """The order that the scheduler makes of prompts is kept, so that what is given out together shares its stems."""
    jobs = {0: job(*[1] * 20, 9), 1: job(*[1] * 20, 5, 6, 7), 2: job(*[1] * 20, 8), 3: job(*[1] * 20, 5, 6, 8)}
    (group,) = groups_of(jobs, 1)
    assert [load.number for load in group.loads] == [1, 3, 2, 0]
    assert [load.rows for load in group.loads] == [23, 1, 1, 1]
    assert group.shared == 20


def test_without_sharing_every_job_is_its_own_group() -> None:
    groups = groups_of(suite(groups=1, jobs=5, shared=100, own=1), 2, share_prefix=False)
    assert [load.rows for group in groups for load in group.loads] == [101] * 5
    assert len(groups) == 5


def test_long_answers_are_handed_out_first() -> None:
    """What is short is computed beside them."""
    jobs = {number: Job(prompt=[number + 1] * 9, max_new_tokens=count) for number, count in enumerate((1, 8, 1, 30))}
    assert [load.number for group in groups_of(jobs, 2) for load in group.loads] == [3, 1, 0, 2]


def test_a_run_that_comes_while_many_devices_are_at_work_is_not_cut_for_all_of_them() -> None:
    """It is no more than a device's fair share of what is left to do, that of those at work included."""
    num_places = 40
    shares = SharingOut(num_places)
    shares.add({number: job(*range(1000 * number, 1000 * number + 499)) for number in range(num_places)})
    one = Room(rows=499, jobs=1)
    assert all(len(numbers) == 1 for numbers in shares.hand_out(dict.fromkeys(range(num_places), one)).values())
    first = num_places
    shares.add({first + number: each for number, each in suite(groups=2, jobs=20, shared=100, own=19).items()})
    given = shares.hand_out({0: WIDE, 1: WIDE})
    runs = [range(first, first + 20), range(first + 20, first + 40)]
    assert sorted(map(sorted, given.values())) == [*map(list, runs)]


def test_a_group_remembers_nothing_of_jobs_that_were_forgotten_and_come_again_in_another() -> None:
    jobs = suite(groups=2, jobs=6, shared=50, own=5)
    shares = SharingOut(2)
    shares.add(jobs)
    room = Room(rows=60, jobs=2)
    given = list(shares.hand_out({0: room})[0])
    shares.remove([2, 3, 8])
    everything: list[int] = []
    while given:
        everything += given
        shares.entered(given)
        shares.remove(given)
        given = [number for numbers in shares.hand_out({0: room, 1: room}).values() for number in numbers]
    assert sorted(everything) == sorted(set(jobs) - {2, 3, 8})
