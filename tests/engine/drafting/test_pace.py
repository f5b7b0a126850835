"""Protects: drafts are as long as pays by what was measured, and none is made where none pays."""

from __future__ import annotations

import pytest

from engine.drafting.pace import MOST_DRAFTED, Line, Pace


def paced(*, sweep: tuple[float, float], step_s: float, came: int, tried: int) -> Pace:
    """A pace that has seen sweeps of `sweep` seconds and seconds a row, and passes of so many seconds."""
    pace = Pace()
    for rows in (10, 40, 500):
        pace.sweeps.add(rows, sweep[0] + sweep[1] * rows)
        pace.steps.add(10, step_s)
    pace.checked(came, tried)
    return pace


def by_hand(acceptance: float, sweep: tuple[float, float], step_s: float, count: int) -> int:
    """The length with the most tokens a second, by the sum of a geometric series."""
    rates = []
    for size in range(MOST_DRAFTED + 1):
        tokens = (1 - acceptance ** (size + 1)) / (1 - acceptance)
        rates.append(tokens / (sweep[0] + sweep[1] * count * (1 + size) + size * step_s))
    return rates.index(max(rates))


def test_a_line_is_the_one_through_its_points() -> None:
    line = Line()
    line.add(10, 3.0)
    assert line.at(10) == line.at(1000) == 3.0  # nothing is known of what rows cost
    line.add(30, 4.0)
    assert line.slope == pytest.approx(0.05)
    assert line.at(50) == pytest.approx(5.0)


@pytest.mark.parametrize("sweep", [(0.7, 0.0), (0.7, 1e-4), (0.01, 1e-3)])
@pytest.mark.parametrize("step_s", [0.001, 0.05])
@pytest.mark.parametrize("acceptance", [0.1, 0.5, 0.8, 0.99])
def test_the_length_is_the_one_that_pays_most(sweep: tuple[float, float], step_s: float, acceptance: float) -> None:
    pace = paced(sweep=sweep, step_s=step_s, came=round(acceptance * 10**6), tried=10**6)
    expected = by_hand(acceptance, sweep, step_s, 10)
    found = pace.size(10, 10)
    assert found == expected
    assert pace.is_paused == (expected == 0)


def test_drafts_that_do_not_pay_pause_longer_each_time() -> None:
    pace = paced(sweep=(0.01, 1e-3), step_s=0.05, came=0, tried=500)
    told = []
    for _ in range(400):
        told.append(pace.size(10, 10))
        if not pace.is_paused:
            pace.checked(0, 100)
    assert set(told) == {0}


def test_one_sweep_in_a_while_drafts_nothing() -> None:
    """Else all have the same rows, and what rows cost could not be told."""
    pace = paced(sweep=(0.7, 0.0), step_s=0.001, came=90, tried=100)
    sizes = []
    for _ in range(200):
        sizes.append(pace.size(10, 10))
        pace.sweeps.add(80, 0.7)
    assert all(sizes[:8])
    assert 3 <= sizes.count(0) <= 7


def test_a_first_pass_that_compiled_kernels_is_not_believed_for_ever() -> None:
    """5 s for the first prompt of 500 tokens, in truth 5 ms; each is to save 2 s of sweeps."""
    pace = Pace()
    assert pace.most_sequences(100) < 100
    assert pace.pays_to_begin(500, 30, 10, 3)
    pace.sweeps.add(100, 1.0)
    for _ in range(5):
        pace.steps.add(10, 0.005)
    pace.steps.add(500, 5.0)
    assert pace.most_sequences(100) == 100
    asked = [pace.pays_to_begin(500, 30, 10, 3) for _ in range(100)]
    assert asked.count(True) == 1
    for _ in range(20):
        pace.steps.add(10, 0.005)
    pace.steps.add(500, 0.010)
    assert pace.pays_to_begin(500, 30, 10, 3)
