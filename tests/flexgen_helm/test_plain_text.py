"""Protects: nothing that a terminal takes for a command reaches one, whoever wrote it."""

from __future__ import annotations

import io
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.workers.plain import plain
from flexgen_helm.run import main
from flexgen_helm.terminal.plain_text import plain_output


class Terminal(io.StringIO):
    """What a terminal is sent."""

    def isatty(self) -> bool:
        return True


@given(st.text(st.characters(codec=None)))
def test_a_terminal_gets_no_control_characters(text: str) -> None:
    sent = plain(text)
    sent.encode()  # no half of a surrogate pair is left
    assert re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", sent) is None
    if text.isprintable():
        assert sent == text


@pytest.mark.parametrize("text", ["plain", "two\nlines\tand\rmore", "日本語　空白", "e\u0301té"])
def test_text_of_all_languages_stays(text: str) -> None:
    assert plain(text) == text


def test_commands_write_plain_text_to_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", pipe)
    with plain_output():
        print("red \x1b[31m", "\udc80")
        sys.stderr.write("\x1b[0m")
    assert terminal.getvalue() == "red \\x1b[31m \\udc80\n"
    assert pipe.getvalue() == "\x1b[0m"
    assert (sys.stdout, sys.stderr) == (terminal, pipe)


def test_what_a_command_prints_goes_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr("flexgen_helm.commands.doctor.doctor", lambda _: print("\x1b]0;title\x07") or 0)
    assert main(["doctor"]) == 0
    assert terminal.getvalue() == "\\x1b]0;title\\x07\n"


def test_commands_run_where_standard_output_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cron and `>&-` leave it."""
    monkeypatch.setattr(sys, "stdout", None)
    with plain_output():
        assert sys.stdout is None
        print("to nobody")
    assert sys.stdout is None
