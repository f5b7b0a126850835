"""Protects: the time that prompts and fetches share is that of a simulation, sweep by sweep."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.planning.overlap import Overlap


def simulated(
    requests: int, seats: int, per_sweep: int, new: int, prompt_s: float, weights_s: float, row_s: float
) -> float:
    """Seconds of all sweeps: each brings the weights and what runs, and computes the prompts that come in meanwhile."""
    waiting, running, seconds = requests, list[int](), 0.0
    while waiting or running:
        entering = min(waiting, per_sweep, seats - len(running))
        seconds += max(weights_s + row_s * len(running), prompt_s * entering)
        waiting -= entering
        running = [left - 1 for left in running if left > 1] + [new - 1] * entering
    return seconds


@settings(deadline=None, max_examples=200)
@given(
    seats=st.integers(100, 300),
    houses=st.integers(1, 2),
    part=st.floats(0.5, 1.5),
    new=st.integers(20, 60),
    weights=st.floats(0.02, 0.8),
    prompt_s=st.floats(0.1, 0.3),
)
def test_it_is_about_what_a_simulation_says(
    seats: int, houses: int, part: float, new: int, weights: float, prompt_s: float
) -> None:
    """`weights`: their part of what crosses the link for the cache; `part`: prompts let in, of those hidden."""
    cache_s = 4.0
    weights_s = weights * cache_s
    per_sweep = max(1, int(part * (weights_s + cache_s) / prompt_s))
    sweeps = math.ceil(seats / per_sweep)
    if sweeps > new // 2:
        return  # the house is never full
    prefill_s = houses * seats * prompt_s
    overlap = Overlap(sweeps=sweeps, houses=houses, prefill_s=prefill_s, weights_s=weights_s, cache_s=cache_s)
    decode_s = houses * (new - 1) * (weights_s + cache_s) + (sweeps - 1) * weights_s
    assert 0 <= overlap.hidden_s <= min(prefill_s, decode_s) * 1.001
    expected = simulated(houses * seats, seats, per_sweep, new, prompt_s, weights_s, cache_s / seats)
    assert prefill_s + decode_s - overlap.hidden_s == pytest.approx(expected, rel=0.08)


def test_nothing_but_weights_is_there_to_hide_behind() -> None:
    """Those of the first of four sweeps are no decode step's."""
    one = Overlap(sweeps=4, houses=1, prefill_s=8.0, weights_s=0.5, cache_s=0.0)
    assert one.hidden_s == pytest.approx(3 * 0.5)
    assert Overlap(sweeps=1, houses=1, prefill_s=8.0, weights_s=0.5, cache_s=4.0).hidden_s == 0
