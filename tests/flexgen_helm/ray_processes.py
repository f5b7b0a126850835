"""Which processes of this machine are workers that Ray has started for a test."""

from __future__ import annotations

from pathlib import Path

MARK = "FLEXGEN_HELM_TEST_SESSION"
"""A variable that workers of a session have in their environment, by which they are found."""


def workers_of(mark: str) -> list[int]:
    """Processes of workers that were started with this mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:  # it has ended, or is another user's
            continue
        if name.startswith(b"ray::HostActor") and f"{MARK}={mark}".encode() in environment.split(b"\0"):
            found.append(int(folder.name))
    return sorted(found)
