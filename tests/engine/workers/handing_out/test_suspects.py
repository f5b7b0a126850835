"""Protects: the jobs that end their process are found and fail, and all others are answered, in few deaths."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from engine.workers.handing_out.suspects import Suspects


def answered(num_jobs: int, deadly: set[int], at_once: int, told: bool) -> tuple[set[int], set[int], int]:
    """Jobs answered, jobs failed, and deaths, where a process computes `at_once` jobs in a sweep.

    told: whether a process that dies has told which jobs it was computing; else all that it had are held to be those.
    """
    suspects, left, done, failed, deaths = Suspects(), list(range(num_jobs)), set[int](), set[int](), 0
    while left:
        group = suspects.group
        given_out = [job for job in left if group is None or job in group]
        assert given_out, "somebody can always be computed"
        while given_out:
            sweep, given_out = given_out[:at_once], given_out[at_once:]
            if deadly & set(sweep):
                deaths += 1
                assert deaths < 10_000
                lost = suspects.died(sweep if told else sweep + given_out)
                failed.update(lost)
                left = [job for job in left if job not in lost]
                break
            done.update(sweep)
            suspects.ended(sweep)
            left = [job for job in left if job not in sweep]
    return done, failed, deaths


@given(st.integers(1, 60), st.sets(st.integers(0, 59), max_size=4), st.integers(1, 20), st.booleans())
def test_only_the_deadly_fail(num_jobs: int, deadly: set[int], at_once: int, told: bool) -> None:
    deadly &= set(range(num_jobs))
    done, failed, deaths = answered(num_jobs, deadly, at_once, told)
    assert failed == deadly
    assert done == set(range(num_jobs)) - deadly
    most = at_once if told else num_jobs
    assert deaths <= len(deadly) * (3 + math.ceil(math.log2(most)))


@given(st.lists(st.sets(st.integers(0, 9), min_size=1), max_size=1))
def test_one_death_proves_nothing(deaths: list[set[int]]) -> None:
    suspects = Suspects()
    for at_work in deaths:
        assert suspects.died(at_work) == []
    assert suspects.group is None


def test_deaths_at_other_jobs_prove_nothing() -> None:
    """A process that is killed from outside now and then is always at other jobs."""
    suspects = Suspects()
    for first in range(0, 100, 10):
        assert suspects.died(range(first, first + 10)) == []
        suspects.ended(range(first, first + 10))
        assert suspects.group is None


def test_a_job_is_computed_alone_before_it_fails() -> None:
    suspects = Suspects()
    assert suspects.died([4]) == []
    assert suspects.died([4]) == []
    assert suspects.group == {4}
    assert suspects.died([4]) == [4]
    assert suspects.group is None


def test_dropped_suspects_are_not_waited_for() -> None:
    suspects = Suspects()
    suspects.died([1, 2])
    suspects.died([1, 2])
    assert suspects.group == {1}
    suspects.ended([1])
    assert suspects.group == {2}
    suspects.ended([2])
    assert suspects.group is None
