"""Text on a terminal without what the terminal would take for commands."""

from __future__ import annotations

import io
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
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
        """Write `plain(text)`; how many characters of `text` were written."""
        self._stream.write(plain(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def beneath(stream: TextIO) -> TextIO:
    """The stream that takes what is written to `stream` as it is: for what is plain already, and how it is drawn."""
    while isinstance(stream, PlainText):
        stream = stream._stream
    return stream


@contextmanager
def plain_output() -> Iterator[None]:
    """Within, standard output and error are plain where they are terminals, and never refuse a character.

    Names and texts come from files and models of others. A file or pipe gets them as they are, but for characters that
    its encoding lacks, which are written as escapes. One that was closed before the command began (None) stays so.
    """
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (PlainText(each) if each is not None and each.isatty() else each for each in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
