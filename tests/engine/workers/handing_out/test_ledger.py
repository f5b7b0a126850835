"""Protects: jobs that processes die with are asked again, and only what ends processes everywhere fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine.asking.pending import Call
from engine.job import Completion, Job
from engine.workers.handing_out.ledger import Ledger
from engine.workers.handing_out.sharing_out import Room

ROOM = Room(rows=120, jobs=8)


class Machine:
    """Devices that compute what a ledger gives them, a sweep of a few jobs at a time, one after the other."""

    def __init__(self, count: int, num_places: int, dies: Callable[[int, list[int]], bool], **how: Any) -> None:
        """`dies`: whether the sweep of these jobs ends the process of that device."""
        self.jobs = {number: Job(prompt=[7] * 20 + [number % 5, number], max_new_tokens=1) for number in range(count)}
        self.ledger = Ledger(num_places, **how)
        self.in_step = bool(how.get("in_step"))
        self.dies = dies
        self.has: dict[int, list[int]] = {place: [] for place in range(num_places)}
        self.answered: list[int] = []
        self.failed: list[int] = []
        self.deaths: list[int] = []
        call = Call(dict(self.jobs), lambda result: None)
        self.ledger.add(call, self.jobs)

    def run(self, at_once: int) -> None:
        for _ in range(10_000):
            for place, asked in self.ledger.to_send(dict.fromkeys(self.has, ROOM)).items():
                self.has[place] += [number for jobs in asked.values() for number, _ in jobs]
            busy = [place for place, jobs in self.has.items() if jobs]
            if not busy:
                break
            for place in busy:
                self.sweep(place, at_once)
        assert self.ledger.is_empty, "nothing waits for ever"

    def sweep(self, place: int, at_once: int) -> None:
        sweep, self.has[place] = self.has[place][:at_once], self.has[place][at_once:]
        if not sweep:
            return
        self.ledger.entered(sweep)
        if self.dies(place, sweep):
            self.deaths.append(place)
            places = [place, *(other for other in self.has if self.in_step and other != place)]
            lost = self.ledger.died(places, is_job_at_fault=True)
            for other in places:
                self.has[other] = []
            self.failed += lost
            self.ledger.answered((number, Completion()) for number in lost)
        else:
            self.answered += sweep
            self.ledger.answered((number, Completion()) for number in sweep)


@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.sets(st.integers(0, 39), max_size=3),
    st.integers(1, 8),
    st.booleans(),
)
def test_only_what_ends_processes_everywhere_fails(
    count: int, num_places: int, deadly: set[int], at_once: int, in_step: bool
) -> None:
    machine = Machine(count, num_places, lambda place, jobs: bool(deadly & set(jobs)), in_step=in_step)
    machine.run(at_once)
    assert sorted(machine.failed) == sorted(deadly & set(range(count)))
    assert sorted(machine.answered) == sorted(set(range(count)) - deadly)


@given(st.integers(1, 40), st.integers(2, 4), st.integers(1, 8))
def test_a_device_that_fails_costs_no_job(count: int, num_places: int, at_once: int) -> None:
    """Its jobs are suspected, and cleared by another device; it dies each time, until whoever starts it gives up."""
    machine = Machine(count, num_places, lambda place, jobs: place == 1)
    machine.run(at_once)
    assert machine.failed == []
    assert sorted(machine.answered) == list(range(count))


def test_others_are_computed_while_suspects_are() -> None:
    """By another device; with one, or where processes live and die together, they wait."""
    for num_places, in_step, others in ((2, False, True), (2, True, False), (1, False, False)):
        machine = Machine(30, num_places, lambda place, jobs: place == 0, in_step=in_step)
        first: list[int] = []
        for _ in range(2):
            given_out = machine.ledger.to_send({0: ROOM})
            first = [number for jobs in given_out[0].values() for number, _ in jobs]
            machine.ledger.entered(first)
            assert machine.ledger.died(range(num_places), is_job_at_fault=True) == []
        given_out = machine.ledger.to_send(dict.fromkeys(range(num_places), ROOM))
        sent = {place: {number for jobs in asked.values() for number, _ in jobs} for place, asked in given_out.items()}
        trials = [numbers for numbers in sent.values() if numbers & set(first)]
        assert [len(numbers) for numbers in trials] == [(len(first) + 1) // 2]
        assert trials[0] < set(first)
        assert any(not numbers & set(first) for numbers in sent.values()) == others


def test_a_trial_has_its_device_for_itself() -> None:
    """Nobody else is with suspects, or a neighbour could be blamed."""
    machine = Machine(30, 2, lambda place, jobs: 3 in jobs)
    begun: list[list[int]] = []
    trial = machine.ledger._suspects

    def watched(place: int, jobs: list[int]) -> bool:
        suspects = trial.jobs
        begun.append(jobs)
        assert not suspects & set(jobs) or set(jobs) <= suspects
        return 3 in jobs

    machine.dies = watched
    machine.run(5)
    assert machine.failed == [3]
    assert machine.deaths[-1] != machine.deaths[-2]  # the device of the last death is not the only witness


def test_one_device_gets_everything_as_it_comes() -> None:
    ledger = Ledger()
    jobs = {index: Job(prompt=[9 - index], max_new_tokens=1) for index in range(5)}
    ledger.add(Call(dict(jobs), lambda result: None), jobs)
    sent = ledger.to_send({0: Room(rows=1, jobs=1)})
    assert [number for number, _ in sent[0][0]] == [0, 1, 2, 3, 4]
    assert ledger.to_send({0: Room(rows=1, jobs=1)}) == {}


def test_a_trial_goes_on_where_it_is_when_another_device_dies() -> None:
    machine = Machine(1, 3, lambda place, jobs: False)
    ledger = machine.ledger
    for place in (0, 1):  # two deaths: from now on the job is a suspect
        assert list(ledger.to_send({place: ROOM})) == [place]
        ledger.entered([0])
        ledger.died([place], is_job_at_fault=True)
    assert list(ledger.to_send({2: ROOM})) == [2]
    ledger.died([0], is_job_at_fault=True)
    assert ledger.to_send({1: ROOM, 2: ROOM}) == {}, "it is computed already"


def test_devices_that_come_and_go_are_given_what_is_left() -> None:
    jobs = {number: Job(prompt=[number] * 30, max_new_tokens=1) for number in range(6)}
    ledger = Ledger(0)
    ledger.add(Call(dict(jobs), lambda result: None), jobs)
    assert ledger.to_send({}) == {}
    ledger.join(7)
    given = [number for asked in ledger.to_send({7: ROOM})[7].values() for number, _ in asked]
    assert len(given) == 4  # as many as there is room for
    ledger.died([7], is_job_at_fault=False)
    ledger.give_up(7)
    ledger.join(8)
    room = Room(rows=1000, jobs=8)
    assert sorted(number for asked in ledger.to_send({8: room})[8].values() for number, _ in asked) == list(jobs)
