"""Terminal output without characters that the terminal would interpret as commands."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from engine.workers.plain import PlainText


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
