"""Protects: a block in place shows its rows and nothing that names could do to a terminal, and leaves what stays."""

from __future__ import annotations

import io
import sys

import pytest
from screens import screen

from engine.workers.plain import PlainText
from flexgen_helm.terminal.live import LiveBlock, Row


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TERM", "xterm"), ("COLUMNS", "80"), ("LINES", "24")):
        monkeypatch.setenv(name, value)


def test_rows_are_drawn_in_place_below_what_stays() -> None:
    stream = Terminal()
    block = LiveBlock(stream)
    block.say("before")
    block.show([Row("suite", "nightly"), Row("runs", "1/4", 0.25)])
    block.show([Row("suite", "nightly"), Row("runs", "2/4", 0.5), Row("now", "a model")])
    block.say("run 2/4: done")
    before, done, suite, runs, now = screen(stream.getvalue())
    assert (before, done) == ("before", "run 2/4: done")
    assert (suite.split(), now.split()) == (["suite", "nightly"], ["now", "a", "model"])
    label, bar, text = runs.split()
    assert (label, text) == ("runs", "2/4")
    assert len(bar) == 32
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")  # the cursor is to be seen
    block.clear()
    assert screen(stream.getvalue()) == ["before", "run 2/4: done"]


def test_names_do_nothing_to_the_terminal() -> None:
    stream = Terminal()
    block = LiveBlock(PlainText(stream))
    name = "a\x1b[2Jb\u202e[red]c[/red]:smile:\nd"
    block.show([Row(name, name)])
    block.say(name.replace("\n", " "))
    written = stream.getvalue()
    assert "\x1b[2J" not in written
    assert "\u202e" not in written
    shown = r"a\x1b[2Jb\u202e[red]c[/red]:smile: d"
    assert screen(written) == [shown, f"{shown}  {shown}"]
    block.clear()


def test_what_others_print_goes_above_if_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, file = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", PlainText(terminal))
    monkeypatch.setattr(sys, "stdout", file)
    block = LiveBlock(sys.stderr)
    block.show([Row("suite", "nightly")])
    print("a warning\x1b[2J", file=sys.stderr)
    print("a result")
    for percent in (0, 50, 100):
        print(f"\r{percent} %", end="", file=sys.stderr, flush=True)
    warning, row = screen(terminal.getvalue())
    assert warning == r"a warning\x1b[2J"
    assert row.split() == ["suite", "nightly"]
    block.clear()
    assert screen(terminal.getvalue()) == [warning, "100 %"]
    assert file.getvalue() == "a result\n"
    assert isinstance(sys.stderr, PlainText)
    assert sys.stdout is file


@pytest.mark.parametrize("term", [None, "dumb"])
def test_where_nothing_can_be_drawn_in_place(term: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LiveBlock.can_be_on(Terminal())
    assert not LiveBlock.can_be_on(io.StringIO())
    monkeypatch.setenv("TERM", term) if term else monkeypatch.delenv("TERM")
    assert not LiveBlock.can_be_on(Terminal())
