"""Protects: what a worker prints to a terminal holds no commands for it, however it is printed."""

from __future__ import annotations

import io
import sys

import pytest

from engine.workers.plain import print_plain_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_and_texts_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    print_plain_text()
    sys.stderr.write("a\x1b[31m\n")
    sys.stderr.writelines(["b\x9b2J\n", "c\u202e\n"])
    assert terminal.getvalue() == "a\\x1b[31m\nb\\x9b2J\nc\\u202e\n"
