"""Small disks: file systems of their own, in memory (tmpfs) or in a file (ext4)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

KINDS = ("tmpfs", "ext4")
_WHOLE_BYTES = 64 << 20


class SmallDisk:
    """A mounted file system."""

    def __init__(self, place: Path, kind: str, free_bytes: int) -> None:
        self._place, self._kind = place, kind
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        if kind == "tmpfs":  # which takes 0 for no limit at all
            _run("mount", "-t", "tmpfs", "-o", f"size={max(4096, free_bytes)}", "none", str(place))
            return
        image = place.with_name(f"{place.name}.ext4")
        with image.open("wb") as file:
            file.truncate(_WHOLE_BYTES)
        _run("mkfs.ext4", "-q", "-m", "0", str(image))
        _run("mount", "-o", "loop", str(image), str(place))
        image.unlink()  # it lives as long as it is mounted
        with (place / "filler").open("wb", buffering=0) as filler:
            block = bytes(4096)
            try:
                while True:
                    filler.write(block)
            except OSError:
                filler.truncate(max(0, filler.tell() - free_bytes))

    def make_room(self) -> None:
        """Let it have all the room that is needed."""
        if self._kind == "tmpfs":
            _run("mount", "-o", f"remount,size={_WHOLE_BYTES}", str(self._place))
        else:
            (self._place / "filler").unlink()


@contextmanager
def small_disk(place: Path, kind: str, free_bytes: int) -> Iterator[SmallDisk]:
    """`place` with so much room; skips a test where nothing can be mounted."""
    try:
        disk = SmallDisk(place, kind, free_bytes)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"{kind} cannot be mounted here: {error}")
    try:
        yield disk
    finally:
        _run("umount", "--lazy", str(place))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
