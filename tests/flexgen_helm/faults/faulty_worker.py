"""The program of a worker process that stays in the process group of its command, as without forked helpers."""

from __future__ import annotations

import os
from contextlib import suppress

import slow_worker
from faulty_command import limit_memory


def main(line: int) -> None:
    """As `engine.worker.main`."""
    limit_memory()
    with suppress(OSError):  # the command has ended meanwhile
        os.setpgid(0, os.getpgid(os.getppid()))
    slow_worker.main(line)
