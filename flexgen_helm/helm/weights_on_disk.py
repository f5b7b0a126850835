"""Weights that are overwritten in place while an engine reads them, noticed before its answers are kept."""

from __future__ import annotations

import os
from pathlib import Path

from engine.checkpoint.files import weight_files

from engine.errors import EngineError


class WeightsOnDisk:
    """The weight files of a model directory as they were when this was made.

    A file that another has taken the place of, or that is gone, is none of an engine's business: it has the old one
    open. One whose bytes were changed is what it reads from then on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = {file: os.stat(file) for file in weight_files(path)}

    def check(self) -> None:
        """Raise `EngineError` where the bytes of a file were changed since."""
        for file, known in self._known.items():
            try:
                now = os.stat(file)
            except OSError:
                continue
            if (now.st_dev, now.st_ino) != (known.st_dev, known.st_ino):
                continue
            if (now.st_size, now.st_mtime_ns) != (known.st_size, known.st_mtime_ns):
                raise EngineError(
                    f"{file} was overwritten while {self._path} was being run ({known.st_size} bytes then, "
                    f"{now.st_size} now, or another time of writing): answers may be of mixed weights and are not "
                    "kept; run again when nobody writes there, or copy the model"
                )
