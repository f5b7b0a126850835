"""Holds a model's weight files open, to notice when one is written to while it is being read."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path

from engine.checkpoint.weight_files import all_weight_files
from engine.errors import CheckpointError, EngineError
from engine.reading import open_file, reason

_State = tuple[int, int, int]


class OpenedWeights:
    """Holds the weight files of a model directory open.

    A file that is replaced or deleted does no harm once every reader has opened it: an open file keeps its content. A
    file that is overwritten in place has other numbers from then on.
    """

    def __init__(self, path: Path) -> None:
        """Create it before any reader opens the files. Raises `CheckpointError`."""
        self._lock = threading.Lock()
        with ExitStack() as opened:  # closes those before one that cannot be opened
            self._files = [
                (file, opened.enter_context(open_file(file, CheckpointError))) for file in all_weight_files(path)
            ]
            self._states = [_state(os.fstat(stream.fileno())) for _, stream in self._files]
            opened.pop_all()

    def duplicates(self) -> list[tuple[Path, int]]:
        """Copies of the file handles that outlive `close`; the caller closes them. Raises `EngineError` if closed."""
        with self._lock:
            if not self._files:
                raise EngineError("the weight files have been closed, so their digest is not known; start again")
            return [(file, os.dup(stream.fileno())) for file, stream in self._files]

    def check_names(self) -> None:
        """Raise `CheckpointError` if a name leads to another file by now; call it when all readers have opened it."""
        with self._lock:
            for (file, _), state in zip(self._files, self._states, strict=False):
                try:
                    is_same = _state(file.stat())[0] == state[0]
                except OSError:
                    is_same = False
                if not is_same:
                    raise CheckpointError(f"{file} was replaced while it was being opened; start again")

    def check(self) -> None:
        """Raise `CheckpointError` if a file has been written to since it was opened."""
        with self._lock:
            for (file, stream), state in zip(self._files, self._states, strict=False):
                try:
                    found = _state(os.fstat(stream.fileno()))
                except OSError as error:  # as of a network drive that went away
                    raise CheckpointError(f"{file} cannot be read any more: {reason(error)}; start again") from None
                if found != state:
                    raise CheckpointError(
                        f"{file} was written to while the engine reads its weights; what it computed since is "
                        "lost; start again when nothing writes there any more"
                    )

    def close(self) -> None:
        """Close the files; `check` reports nothing from then on."""
        with self._lock:
            for _, stream in self._files:
                stream.close()
            self._files = []


def _state(status: os.stat_result) -> _State:
    return status.st_ino, status.st_size, status.st_mtime_ns
