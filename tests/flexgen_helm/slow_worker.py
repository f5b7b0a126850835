"""The program of a worker process whose sweeps take their time and are written down; a file `broken` ends it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from killed_sweeps import watch_deliveries

from engine import worker
from engine.executor import Executor


def main(line: int) -> None:
    """As `engine.worker.main`."""
    with open("workers", "a") as file:
        file.write(f"{os.getpid()}\n")
    watch_deliveries()
    sweep = Executor.sweep

    def breakable(self: Any, *args: Any) -> Any:
        _end_if_broken()
        return sweep(self, *args)

    _end_if_broken()
    Executor.sweep = breakable  # type: ignore[method-assign]
    worker.main(line)


def _end_if_broken() -> None:
    if Path("broken").exists():
        os.kill(os.getpid(), signal.SIGKILL)
