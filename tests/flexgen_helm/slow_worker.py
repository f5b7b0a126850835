"""The program of a worker process whose sweeps take their time and are written down."""

from __future__ import annotations

from killed_sweeps import watch_deliveries

from engine import worker


def main(line: int) -> None:
    """As `engine.worker.main`."""
    watch_deliveries()
    worker.main(line)
