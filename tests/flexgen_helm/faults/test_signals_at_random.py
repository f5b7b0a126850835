"""Protects: processes that are killed, interrupted or terminated at any moment lose no answer and leave no files."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from commands import SEEDS, Complete, Sweep
from faulty_command import Fault

pytestmark = pytest.mark.faults
PHASES = ("load", "sweep", "cache", "metrics", "report")
MakeSweep = Callable[..., Sweep]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("whom", ["command", "group"])
def test_a_killed_sweep_goes_on(
    whom: str, phase: str, seed: int, make_sweep: MakeSweep, undisturbed_sweep: Sweep
) -> None:
    sweep = make_sweep()
    ended = sweep.run(fault=Fault.drawn(phase, whom, signal.SIGKILL, seed).as_text())
    assert ended.code in ((-signal.SIGKILL, 0) if sweep.has_arrived else (0,)), ended
    sweep.run(*["--skip-completed-runs"] * (seed % 2)).check_clean(0)
    sweep.check_like(undisturbed_sweep)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_sweep_outlives_its_engine(phase: str, seed: int, make_sweep: MakeSweep, undisturbed_sweep: Sweep) -> None:
    sweep = make_sweep()
    sweep.run(fault=Fault.drawn(phase, "engine", signal.SIGKILL, seed).as_text()).check_clean(0)
    sweep.check_like(undisturbed_sweep)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("phase", PHASES[:-1])  # none is left when the report is written
def test_a_sweep_outlives_a_process_that_helps(
    phase: str, seed: int, make_sweep: MakeSweep, undisturbed_sweep: Sweep
) -> None:
    sweep = make_sweep()
    sweep.run(fault=Fault.drawn(phase, "helper", signal.SIGKILL, seed).as_text(), HELPERS="1").check_clean(0)
    sweep.check_like(undisturbed_sweep)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("whom", ["command", "group"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"])
def test_a_sweep_that_is_asked_to_end_ends_in_a_line(
    number: signal.Signals, code: int, whom: str, phase: str, seed: int, make_sweep: MakeSweep, undisturbed_sweep: Sweep
) -> None:
    sweep = make_sweep()
    ended = sweep.run(fault=Fault.drawn(phase, whom, number, seed).as_text())
    ended.check_clean(*((code, 0) if phase == "report" else (code,)) if sweep.has_arrived else (0,))
    sweep.run().check_clean(0)
    sweep.check_like(undisturbed_sweep)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("phase", ["load", "answers"])
@pytest.mark.parametrize("whom", ["command", "group", "engine"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=["kill", "int", "term"])
def test_completions_go_on(
    number: signal.Signals,
    whom: str,
    phase: str,
    seed: int,
    make_complete: Callable[..., Complete],
    undisturbed_complete: Complete,
) -> None:
    complete = make_complete()
    ended = complete.run(fault=Fault.drawn(phase, whom, number, seed).as_text())
    if number != signal.SIGKILL:
        ended.check_clean(0, 130, 143)
    complete.run().check_clean(0)
    assert complete.answers() == undisturbed_complete.answers()
    assert complete.files() == undisturbed_complete.files()
