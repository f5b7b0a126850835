"""Replaces files atomically, whatever ends the process that writes them. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def replace_text(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Replace the content of `path` by `text`, atomically; raises `OSError`.

    mode: permissions of a file that does not exist yet, restricted by the umask.

    The text is first written to `.NAME.partial` in the same directory. A partial file that a killed process has left is
    overwritten by the next one; processes that replace the same file take turns.
    """
    partial = partial_of(path)
    with _held(partial, mode) as handle:
        try:
            os.ftruncate(handle, 0)
            with open(handle, "wb", closefd=False) as file:
                file.write(text.encode("utf-8", errors="replace"))
            found = stat.S_IMODE(os.fstat(handle).st_mode)
            try:
                wanted = stat.S_IMODE(path.stat().st_mode)
            except FileNotFoundError:
                wanted = found & mode  # what a killed process has left may be open to more
            if wanted != found:
                os.fchmod(handle, wanted)
            os.fsync(handle)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def partial_of(path: Path) -> Path:
    """The file to which the new content of `path` is first written."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def _held(partial: Path, mode: int) -> Iterator[int]:
    """Open and lock the partial file, and yield its descriptor."""
    while True:
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise FileExistsError(errno.EEXIST, f"{partial} is no regular file")
            with suppress(OSError):  # a file system without locks: writers may then interfere
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_named(handle, partial):
                yield handle
                return
        finally:
            os.close(handle)


def _is_named(handle: int, partial: Path) -> bool:
    """Whether the open file still has its name: the previous holder of the lock may have renamed or removed it."""
    try:
        return os.path.samestat(os.fstat(handle), partial.stat())
    except FileNotFoundError:
        return False
