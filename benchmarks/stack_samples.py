"""Samples the stacks of all threads of a program, from a thread of its own, to make a timeline of its start.

The program that is watched needs no code for it. `main` is a program for a worker process that is watched likewise.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

_EVERY_S = 0.02
_OURS = ("flexgen_helm", "engine")
_FILE = "FLEXGEN_HELM_SAMPLES"
"""The environment variable that names the file into which a worker process writes its samples."""
_SHORTEST_S = 0.1
"""Spans shorter than this are not shown."""

Span = tuple[str, float, float, str]
"""(thread, begin and end in seconds since the Epoch, what it did)."""


class Samples:
    """Samples all threads but its own until the program ends."""

    def __init__(self, file: Path | None = None) -> None:
        """`file` is written again every second, because a worker process does not end like other programs."""
        self._spans: dict[int, list[Span]] = {}
        self._file = file
        self._thread = threading.Thread(target=self._look, name="samples", daemon=True)
        self._thread.start()

    @property
    def spans(self) -> list[Span]:
        """The samples so far, by thread."""
        return [span for spans in list(self._spans.values()) for span in list(spans)]

    def _look(self) -> None:
        written = time.time()
        while True:
            time.sleep(_EVERY_S)
            now, names = time.time(), {each.ident: each.name for each in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                if ident != threading.get_ident() and ident in names:
                    self._note(ident, names[ident], _doing(frame), now)
            if self._file is not None and now - written > 1:
                written = now
                beside = self._file.with_suffix(".new")
                beside.write_text(json.dumps(self.spans))
                beside.replace(self._file)

    def _note(self, ident: int, name: str, doing: str, now: float) -> None:
        spans = self._spans.setdefault(ident, [])
        if spans and spans[-1][3] == doing:
            spans[-1] = (name, spans[-1][1], now, doing)
        else:
            spans.append((name, spans[-1][2] if spans else now - _EVERY_S, now, doing))


def _doing(frame: FrameType | None) -> str:
    """Name the innermost function of this project, and the outermost module of others that it imports, if any."""
    imported = ""
    while frame is not None:
        name, function = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        if name.split(".")[0] in _OURS and function != "<module>":
            return f"{name}.{function}{imported}"
        if function == "<module>":
            imported = f" imports {name}"
        frame = frame.f_back
    return imported.strip() or "others"


def timeline(spans: Iterable[Span], begun: float) -> str:
    """Format the spans that took most time, in order; seconds since `begun`."""
    shown = sorted((span for span in spans if span[2] - span[1] >= _SHORTEST_S), key=lambda span: span[1])
    return "\n".join(
        f"{first - begun:8.2f} {end - begun:8.2f} {end - first:7.2f}  {thread:<22} {doing}"
        for thread, first, end, doing in shown
    )


def watch_engines(file: Path) -> None:
    """Watch the worker processes that this program starts; the samples of the last one are in `file`."""
    from engine.workers import process

    os.environ[_FILE] = str(file)
    process.PROGRAM = __name__


def main(line: int) -> None:
    """Run `engine.worker` in a worker process, and watch it."""
    Samples(Path(os.environ[_FILE]))
    from engine.worker import main as serve

    serve(line)
