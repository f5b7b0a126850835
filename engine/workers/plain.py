"""What a worker process prints, without what a terminal would take for commands."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO


class _Plain:
    """A text stream that writes to another one what can be printed, and escapes for the rest."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write to the stream; how many characters of `text` were written."""
        told = (each if each.isprintable() or each in "\n\t\r" else ascii(each)[1:-1] for each in text)
        self._stream.write("".join(told))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print_plain_text() -> None:
    """Let this process print nothing else to a terminal: names and texts in its messages come from models."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream.isatty():
            setattr(sys, name, _Plain(stream))
