"""Removes terminal control sequences from what a worker process prints."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO


class _Plain:
    """A text stream that writes printable characters to another stream and escapes all others."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write to the stream; returns the number of characters of `text` that were written."""
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
    """Escape control characters in what this process prints, because names and texts in messages come from models."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream.isatty():
            setattr(sys, name, _Plain(stream))
