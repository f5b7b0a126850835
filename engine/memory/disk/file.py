"""A file of the disk tier, unnamed or of a checkpoint, read and written by direct I/O (pure)."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import CapacityError, ConfigError, EngineError

BLOCK = 4096
"""The alignment, in bytes, of direct reads and writes: of their offset, their size and their memory."""
PIECE_BYTES = 8 << 20
"""The size of one request of many that are under way at once."""
READERS = 8
"""The number of requests that are under way at once."""
_GAP_BYTES = 64 << 10
"""The most unwanted bytes between two parts that one request reads: they take less time than another request."""
_DIRECT = getattr(os, "O_DIRECT", 0)
_NAMELESS = getattr(os, "O_TMPFILE", 0)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFile:
    """An open file for requests of whole blocks, from several threads at once.

    Where the file system supports direct I/O, nothing of it is in the page cache; elsewhere the system is told to drop
    each piece from it.
    """

    def __init__(self, handle: int, name: str, *, is_direct: bool) -> None:
        self.name = name
        """The file's name in messages."""
        self.is_direct = is_direct
        self.writing = threading.Lock()
        """Held while parts of blocks are written: blocks are read, changed and written again."""
        self._handle = handle

    @classmethod
    def create(cls, directory: str, num_bytes: int) -> DiskFile:
        """Create an unnamed file in `directory`, which is created if missing; it reads as zeros.

        The system frees it however the process ends. Raises `CapacityError` when there is no room for `num_bytes`,
        `ConfigError` for a directory that cannot be written.
        """
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            handle, is_direct = _open_nameless(directory)
        except OSError as error:
            if error.errno in _FULL:
                raise _no_room(directory, num_bytes, error) from None
            reason = "Not a directory" if isinstance(error, FileExistsError) else error.strerror
            raise ConfigError(f"offload-dir {directory} is not writable: {reason}; name another directory") from None
        file = cls(handle, f"offload file in {directory}", is_direct=is_direct)
        try:
            file._claim(directory, num_bytes)
        except BaseException:
            file.close()
            raise
        return file

    @classmethod
    def open(cls, path: Path) -> DiskFile:
        """Open an existing file for reading; `EngineError` when it cannot be opened."""
        try:
            handle, is_direct = _open_direct(str(path), os.O_RDONLY)
        except OSError as error:
            raise EngineError(f"{path} cannot be opened: {error.strerror}") from None
        return cls(handle, str(path), is_direct=is_direct)

    def grow(self, directory: str, num_bytes: int) -> None:
        """Enlarge a file of `create`; its content stays."""
        self._claim(directory, num_bytes)

    def read(self, first: int, memory: memoryview, needed: int) -> None:
        """Fill `memory` with the bytes from `first` on, or at least `needed` of them where the file ends.

        Offset, size and memory are aligned to `BLOCK`. Raises `EngineError` with name and offset.
        """
        done = 0
        while done < needed:
            try:
                count = os.preadv(self._handle, [memory[done:]], first + done)
            except OSError as error:
                raise EngineError(
                    f"{self.name}: bytes {first + done} to {first + needed} cannot be read: {error.strerror}; "
                    "check the disk"
                ) from None
            if done + count < needed:
                count -= count % BLOCK  # a direct read goes on at a block
                if count == 0:
                    raise EngineError(f"{self.name}: ends before byte {first + needed}; it was changed meanwhile")
            done += count
        if not self.is_direct:
            os.posix_fadvise(self._handle, first, len(memory), os.POSIX_FADV_DONTNEED)

    def write(self, first: int, memory: memoryview) -> None:
        """Write whole blocks from `first` on; `CapacityError` for a full disk, else `EngineError` with the offset."""
        done = 0
        while done < len(memory):
            try:
                done += os.pwritev(self._handle, [memory[done:]], first + done)
            except OSError as error:
                if error.errno in _FULL:
                    raise CapacityError(
                        f"{self.name}: the disk is full ({error.strerror}) at the write of {len(memory) - done} bytes "
                        f"at {first + done}; make room, name another directory, or place less on disk"
                    ) from None
                raise EngineError(
                    f"{self.name}: {len(memory) - done} bytes at {first + done} cannot be written: "
                    f"{error.strerror}; check the disk"
                ) from None
        if not self.is_direct:
            os.fdatasync(self._handle)  # pages that are not on the disk yet are not forgotten
            os.posix_fadvise(self._handle, first, len(memory), os.POSIX_FADV_DONTNEED)

    def settle(self) -> None:
        """Wait until everything written is on the disk."""
        try:
            os.fdatasync(self._handle)
        except OSError as error:
            raise _failed_to_settle(self.name, error) from None

    def close(self) -> None:
        """Close the file, which deletes an unnamed one. No request may be under way."""
        os.close(self._handle)

    def _claim(self, directory: str, num_bytes: int) -> None:
        try:
            # Claimed at once, so that a full disk shows now, and writes do not wait for each other to extend the file.
            os.posix_fallocate(self._handle, 0, max(BLOCK, align_up(num_bytes)))
        except OSError as error:
            if error.errno in _FULL:
                raise _no_room(directory, num_bytes, error) from None
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise EngineError(f"{self.name}: {num_bytes} bytes cannot be claimed: {error.strerror}") from None
            os.ftruncate(self._handle, align_up(num_bytes))  # a file system that cannot claim


@dataclass(frozen=True)
class ByteRange:
    """A byte range of a file, and its offset in memory."""

    file: DiskFile
    first: int
    end: int
    at: int
    """The offset in the memory to which, or from which, it is copied."""


@dataclass
class Request:
    """Whole blocks of a file that are read or written at once, and the wanted parts of them."""

    file: DiskFile
    first: int
    end: int
    """The end of the last wanted byte; what is read is aligned."""
    parts: list[tuple[int, int, int]] = field(default_factory=list)
    """(offset in the request, offset in memory, bytes)."""

    @property
    def num_bytes(self) -> int:
        """The size in whole blocks."""
        return align_up(self.end - self.first)


def requests_of(spans: Iterable[ByteRange], most_bytes: int = PIECE_BYTES, gap: int = _GAP_BYTES) -> list[Request]:
    """The requests of at most `most_bytes` (whole blocks) that cover `spans`, joined over gaps of at most `gap` bytes.

    With a gap of at least `BLOCK`, no two of them share a block.
    """
    found: list[Request] = []
    spans = list(spans)
    ranks: dict[DiskFile, int] = {}
    for span in spans:
        ranks.setdefault(span.file, len(ranks))
    for span in sorted(spans, key=lambda span: (ranks[span.file], span.first)):
        first, at = span.first, span.at
        while first < span.end:
            last = found[-1] if found else None
            if last is None or last.file is not span.file or first - last.end > gap or first >= last.first + most_bytes:
                last = Request(span.file, first - first % BLOCK, first)
                found.append(last)
            end = min(span.end, last.first + most_bytes)
            last.parts.append((first - last.first, at, end - first))
            last.end = max(last.end, end)
            first, at = end, at + end - first
    return found


def align_up(num_bytes: int) -> int:
    """Round up to whole blocks."""
    return -(-num_bytes // BLOCK) * BLOCK


def _open_nameless(directory: str) -> tuple[int, bool]:
    if _NAMELESS:
        with suppress(OSError):  # some file systems know none; what else is wrong shows below
            return _open_direct(directory, os.O_RDWR | _NAMELESS)
    plain, name = tempfile.mkstemp(prefix="flexgen-", dir=directory)
    try:
        return _open_direct(name, os.O_RDWR)
    finally:
        os.close(plain)
        os.unlink(name)


def _open_direct(name: str, flags: int) -> tuple[int, bool]:
    try:
        return os.open(name, flags | _DIRECT, 0o600), bool(_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(name, flags, 0o600), False


def _no_room(directory: str, num_bytes: int, error: OSError) -> CapacityError:
    system = os.statvfs(directory)
    return CapacityError(
        f"offload-dir {directory}: no room for {_size(num_bytes)} ({_size(system.f_bavail * system.f_frsize)} free, "
        f"{error.strerror}); name another directory, or place less on disk"
    )


def _failed_to_settle(name: str, error: OSError) -> EngineError:
    if error.errno in _FULL:
        return CapacityError(f"{name}: the disk is full ({error.strerror}); make room or name another directory")
    return EngineError(f"{name}: what was written does not reach the disk: {error.strerror}; check the disk")


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.0f} MB"
