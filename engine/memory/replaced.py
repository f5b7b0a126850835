"""Files that are replaced at once or not at all, whatever ends the process that writes them. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def replace_text(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Let `path` hold `text`, which takes effect at once or not at all; raises `OSError`.

    mode: of a file that is not there yet, of which the umask takes away.

    It is written to `.NAME.partial` beside it. What a killed process has left there is written over by the next one,
    rather than left behind; processes that replace the same file take turns.
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
    """Where a new content of `path` is written."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def _held(partial: Path, mode: int) -> Iterator[int]:
    """A handle of the file, locked against other processes that write it."""
    while True:
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise FileExistsError(errno.EEXIST, f"{partial} is no regular file")
            with suppress(OSError):  # a file system without locks: as good as it gets there
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_named(handle, partial):
                yield handle
                return
        finally:
            os.close(handle)


def _is_named(handle: int, partial: Path) -> bool:
    """Whether the file that is open still has the name: who held it before has given it another one, or removed it."""
    try:
        return os.path.samestat(os.fstat(handle), partial.stat())
    except FileNotFoundError:
        return False
