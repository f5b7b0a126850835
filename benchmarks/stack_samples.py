"""What the threads of a program are at, looked at again and again from a thread of its own: a timeline of its start.

Nothing is built into what is watched. `main` is the program of an engine's process that is watched likewise.
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
"""Of the environment: where an engine's process writes what was seen of it."""
_SHORTEST_S = 0.1
"""Of what is shown."""

Span = tuple[str, float, float, str]
"""Thread, when it began and ended in seconds since the Epoch, and what it did."""


class Samples:
    """Looks at all threads but its own until the program ends."""

    def __init__(self, file: Path | None = None) -> None:
        """`file` is written anew every second: an engine's process does not end as others do."""
        self._spans: dict[int, list[Span]] = {}
        self._file = file
        self._thread = threading.Thread(target=self._look, name="samples", daemon=True)
        self._thread.start()

    @property
    def spans(self) -> list[Span]:
        """What was seen so far, by thread."""
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
    """The innermost function of ours, and the outermost module of others that it imports, if it does."""
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
    """Lines of what took its time, in order; seconds since `begun`."""
    shown = sorted((span for span in spans if span[2] - span[1] >= _SHORTEST_S), key=lambda span: span[1])
    return "\n".join(
        f"{first - begun:8.2f} {end - begun:8.2f} {end - first:7.2f}  {thread:<22} {doing}"
        for thread, first, end, doing in shown
    )


def watch_engines(file: Path) -> None:
    """Have the processes of engines watched that this program starts; what was seen of the last one is in `file`."""
    from engine.workers import process

    os.environ[_FILE] = str(file)
    process.PROGRAM = __name__


def main(line: int) -> None:
    """The program of an engine's process: `engine.worker`, watched."""
    Samples(Path(os.environ[_FILE]))
    from engine.worker import main as serve

    serve(line)
