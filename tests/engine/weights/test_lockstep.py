"""Protects: members of a group sweep together, and wait for those whose jobs come a little later."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from engine.errors import EngineError
from engine.weights.members.group import Agreed, Group
from engine.weights.members.lockstep import Lockstep


class Meeting:
    """What members of a group say to each other, in threads of one process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._said: list[tuple[bool, bool]] = []
        self._barrier = threading.Barrier(count, timeout=10)
        self._lock = threading.Lock()

    def agree(self, *, sweep: bool, leave: bool = False) -> Agreed:
        with self._lock:
            self._said.append((sweep, leave))
        self._barrier.wait()
        agreed = Agreed(sweep=sum(each for each, _ in self._said), leave=any(left for _, left in self._said))
        if self._barrier.wait() == 0:
            self._said.clear()
        self._barrier.wait()
        return agreed


def members(count: int) -> tuple[list[Lockstep[str, str]], list[list[list[str]]]]:
    """Members of one group, and the sweeps that each has computed."""
    meeting = cast("Group", Meeting(count))
    swept: list[list[list[str]]] = [[] for _ in range(count)]

    def make(number: int) -> Lockstep[str, str]:
        def sweep(batches: list[str]) -> list[str]:
            swept[number].append(batches)
            return [each.upper() for each in batches]

        return Lockstep(sweep, lambda: None, meeting)

    return [make(number) for number in range(count)], swept


def run(found: list[Lockstep[str, str]], scripts: list[list[list[str]]]) -> list[list[list[str]]]:
    """What each member's sweeps return, one after the other."""
    with ThreadPoolExecutor(len(found)) as pool:
        told = [
            pool.submit(lambda one, script: [one.sweep(each) for each in script], *each)
            for each in zip(found, scripts, strict=True)
        ]
        return [each.result(20) for each in told]


def test_jobs_that_come_a_little_later_join_the_first_sweep() -> None:
    found, swept = members(2)
    assert found[1].idle_s is not None
    before = found[1].idle_s
    answers = run(found, [[["a"], ["aa"]], [[], ["b"], ["bb"]]])
    assert answers == [[["A"], ["AA"]], [[], ["B"], ["BB"]]]
    assert swept == [[["a"], ["aa"]], [["b"], ["bb"]]]
    assert found[1].idle_s == before


def test_who_gets_nothing_is_waited_for_once_and_then_takes_part() -> None:
    found, swept = members(3)
    answers = run(found, [[["a"], ["aa"], []], [["b"], [], []], [[], [], [], []]])
    assert answers == [[["A"], ["AA"], []], [["B"], [], []], [[], [], [], []]]
    assert swept == [[["a"], ["aa"]], [["b"], []], [[], []]]


def test_after_all_were_idle_it_is_waited_again() -> None:
    found, swept = members(2)
    run(found, [[["a"], [], ["b"]], [[], [], [], [], ["c"]]])
    assert swept == [[["a"], ["b"]], [[], ["c"]]]


def test_jobs_that_come_at_once_after_others_are_waited_for_too() -> None:
    """Between two calls of one who asks again at once, the members are never idle together."""
    found, swept = members(2)
    run(found, [[["a"], ["b"]], [["c"], [], ["d"]]])
    assert swept == [[["a"], ["b"]], [["c"], ["d"]]]


def test_a_member_that_ends_while_it_is_waited_for_ends_the_others() -> None:
    found, swept = members(2)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(found[0].sweep, ["a"])
        assert found[1].sweep([]) == []
        found[1].leave()
        with pytest.raises(EngineError, match="has ended"):
            first.result(20)
    assert swept == [[], []]


def test_one_alone_waits_for_nobody() -> None:
    swept: list[Any] = []
    alone: Lockstep[str, str] = Lockstep(lambda batches: swept.append(batches) or batches, lambda: None, None)
    assert alone.idle_s is None
    assert alone.sweep([]) == []
    assert alone.sweep(["a"]) == ["a"]
    assert swept == [["a"]]
