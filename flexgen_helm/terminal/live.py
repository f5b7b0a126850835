"""A block of lines on a terminal that is drawn anew in place, with bars; lines that stay go above it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from engine.workers.plain import PlainText, plain
from flexgen_helm.terminal.plain_text import beneath

if TYPE_CHECKING:
    from rich.table import Table

_BAR_WIDTH = 32


@dataclass(frozen=True)
class Row:
    """A line of the block."""

    label: str
    text: str
    done: float | None = None
    """The part of the bar that is full, from 0 to 1; None for no bar."""


class _Above(PlainText):
    """What is printed while a block is shown. Only lines that have ended are, as they were in the end."""

    _is_whole = True

    def write(self, text: str) -> int:
        """Write `plain(text)`; how many characters of `text` were written."""
        self._is_whole = text.endswith("\n") if text else self._is_whole
        return super().write(text)

    def flush(self) -> None:
        """Wait for the line's end: bars of others rewrite theirs again and again."""

    def end(self) -> None:
        """End a line that has not ended."""
        if not self._is_whole:
            self.write("\n")


class LiveBlock:
    """Rows that are shown in place. What is printed meanwhile goes above them, if it goes to a terminal."""

    @staticmethod
    def can_be_on(stream: TextIO) -> bool:
        """Whether `stream` is a terminal on which something can be drawn in place."""
        return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        # What is printed to a file goes there still.
        redirected = {f"redirect_{name}": getattr(sys, name).isatty() for name in ("stdout", "stderr")}
        # What the block consists of is made plain here; the terminal is to understand how it is drawn.
        self._console = Console(file=beneath(stream), highlight=False, emoji=False, markup=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True, **redirected)

    def show(self, rows: Sequence[Row]) -> None:
        """Draw `rows` in place of those before."""
        from rich.file_proxy import FileProxy

        if not self._live.is_started:
            self._live.start()
            self._console.show_cursor(True)  # a command that is killed would leave none behind
            for name in ("stdout", "stderr"):
                if isinstance(getattr(sys, name), FileProxy):
                    setattr(sys, name, _Above(getattr(sys, name)))
        self._live.update(_table(rows), refresh=True)

    def say(self, line: str) -> None:
        """Write a line that stays, above the rows."""
        from rich.text import Text

        self._console.print(Text(plain(line)), soft_wrap=True)

    def clear(self) -> None:
        """Take the rows away, for good."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Above):
                stream.end()
        self._live.stop()


def _table(rows: Sequence[Row]) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True, min_width=8)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for row in rows:
        line = Text(_one_line(row.text))
        if row.done is None:
            table.add_row(Text(_one_line(row.label)), line)
            continue
        bar = Table.grid(padding=(0, 2))
        bar.add_row(ProgressBar(total=1.0, completed=row.done, width=_BAR_WIDTH), line)
        table.add_row(Text(_one_line(row.label)), bar)
    return table


def _one_line(text: str) -> str:
    return plain(" ".join(text.split()))
