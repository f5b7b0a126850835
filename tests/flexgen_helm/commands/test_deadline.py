"""Protects: `--stop-before` is a moment in local time, and ends a command so early that its last pass has room."""

from __future__ import annotations

import argparse
import signal
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from flexgen_helm.run import main
from flexgen_helm.terminal import deadline
from flexgen_helm.terminal.deadline import Deadline, moment
from flexgen_helm.terminal.signals import TimeUp, heeding_signals

NOW = datetime(2026, 12, 24, 22, 30, 20).astimezone()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return NOW

    monkeypatch.setattr(deadline, "datetime", Clock)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("23:30", NOW.replace(hour=23, minute=30, second=0)),
        ("22:30:21", NOW + timedelta(seconds=1)),
        ("22:30", NOW.replace(second=0) + timedelta(days=1)),
        ("6:05", NOW.replace(hour=6, minute=5, second=0) + timedelta(days=1)),
        ("2026-12-25T06:00", NOW.replace(day=25, hour=6, minute=0, second=0)),
        ("2026-12-25 06:00:01+00:00", datetime(2026, 12, 25, 6, 0, 1, tzinfo=UTC)),
    ],
)
def test_a_time_of_day_is_the_next_one_of_it(text: str, expected: datetime) -> None:
    assert moment(text) == expected


@pytest.mark.parametrize(
    "text", ["", "soon", "24:00", "23:60", "23", "2330", "-1:30", "2026-12-25", "2026-13-01T06:00", "23:30 tomorrow",
             "9999-12-31T23:59:59-23:00"]
)  # fmt: skip
@pytest.mark.parametrize("command", ["run", "sweep"])
def test_what_is_no_time_is_bad_input(text: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, f"--stop-before={text}", "--suite", "s", "-r", "mmlu:subject=anatomy"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("flexgen-helm: error: ")
    assert f"{text!r} is no time; write a time such as 23:30, or a date and a time" in line


def test_what_is_past_is_bad_input() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"'2026-12-24T22:00' is past: it is 2026-12-24T22:30:20"):
        moment("2026-12-24T22:00")


def test_there_is_room_for_the_longest_pass_and_for_the_end() -> None:
    """By hand: 600 s, less 5 for the end, less 1.25 times the longest pass."""
    longest = [0.0]
    watched = Deadline(NOW + timedelta(minutes=10), lambda: longest[0])
    assert watched.left_s() == 595
    longest[0] = 200.0
    assert watched.left_s() == 345


def test_it_is_told_in_the_main_thread_and_not_where_the_command_was_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "_LOOK_S", 0.01)
    with heeding_signals() as signals:
        with pytest.raises(TimeUp), Deadline(NOW + timedelta(seconds=5), lambda: 0.0):
            time.sleep(20)
        assert signals.exit_code == 75
    with heeding_signals() as signals:
        for later in (NOW + timedelta(seconds=6), None):
            with Deadline(later, lambda: 0.0):
                pass
        assert signals.received is None
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
