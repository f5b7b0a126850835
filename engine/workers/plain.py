"""Text without characters that a terminal would interpret as commands; what a worker process prints is such text."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable
from typing import Any, TextIO

_KEPT = frozenset("\n\t\r")


def plain(text: str) -> str:
    """`text` with control characters, text-direction marks and other characters without a shape written as escapes.

    Line ends, tabs and carriage returns stay.
    """
    if all(map(_is_plain, text)):
        return text
    return "".join(each if _is_plain(each) else ascii(each)[1:-1] for each in text)


def _is_plain(character: str) -> bool:
    return character.isprintable() or character in _KEPT or unicodedata.category(character) == "Zs"


class PlainText:
    """A text stream that writes to another one, `plain`; all else is that stream's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `plain(text)` to the stream; returns the number of characters of `text`."""
        self._stream.write(plain(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print_plain_text() -> None:
    """Escape control characters in what this process prints, because names and texts in messages come from models."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream.isatty():
            setattr(sys, name, PlainText(stream))
