"""Host memory that processes of one machine share by a file descriptor (memfd)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from engine.errors import CapacityError, EngineError
from engine.memory.cores import usable_cores

_MADV_POPULATE_WRITE = 23
_TOUCH_BYTES = 64 << 20


class SharedMemory:
    """A mapping of a whole memfd, which every process that has it opens with the same size.

    Its pages exist for all as soon as one process claims them. Ranges of it can be locked; the system releases the
    locks of a process that ends.
    """

    def __init__(self, handle: int, num_bytes: int) -> None:
        """The caller keeps `handle`. Raises `CapacityError` where so much memory is not allowed."""
        # A handle of its own: locks belong to it, and what the caller closes takes none away.
        self._handle = os.open(f"/proc/self/fd/{handle}", os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(self._handle).st_size
            if size not in (0, num_bytes):
                raise EngineError(
                    f"the shared memory holds {size / 1e6:.1f} MB and not {num_bytes / 1e6:.1f} MB: the engines that "
                    "share it were opened by different plans; open all of them again"
                )
            os.ftruncate(self._handle, num_bytes)
            self._pages = mmap.mmap(self._handle, num_bytes, flags=mmap.MAP_SHARED)
        except OSError as error:
            os.close(self._handle)
            raise _refused(num_bytes, error) from None
        except BaseException:
            os.close(self._handle)
            raise
        if hasattr(mmap, "MADV_HUGEPAGE"):  # fewer pages to lock
            with suppress(OSError):  # a kernel without them
                self._pages.madvise(mmap.MADV_HUGEPAGE)
        self.whole = torch.frombuffer(self._pages, dtype=torch.uint8)
        """All of the memory as uint8; only claimed ranges may be used."""

    def claim(self, first: int, end: int) -> torch.Tensor:
        """Allocate the bytes from `first` (a page's start) to `end`, uint8, permanently; contents stay.

        Raises `CapacityError` where the system has no more memory; touching a page instead would end the process.
        """
        tensor = self.whole[first:end]

        def populate(begin: int) -> None:
            _populate(self._handle, self.whole, begin, min(end, begin + _TOUCH_BYTES))

        try:
            with ThreadPoolExecutor(min(16, usable_cores())) as pool:
                list(pool.map(populate, range(first, end, _TOUCH_BYTES)))
        except OSError as error:
            raise _refused(end - first, error) from None
        return tensor

    def lock(self, number: int) -> bool:
        """Try to take lock `number` for this process; False if another one has it."""
        try:
            self._set_lock(number, 1, fcntl.F_WRLCK)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def unlock(self, number: int) -> None:
        """Release a lock."""
        self._set_lock(number, 1, fcntl.F_UNLCK)

    def unlock_all(self) -> None:
        """Release all locks."""
        self._set_lock(0, 0, fcntl.F_UNLCK)

    def _set_lock(self, number: int, count: int, kind: int) -> None:
        # `struct flock`: kind, whence, first, length (0: all), process (none: the lock is of the handle)
        fcntl.fcntl(self._handle, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, number, count, 0))

    def close(self) -> None:
        """Release all locks; the memory stays as long as a view of it exists."""
        self.unlock_all()  # the mapping keeps the handle, and with it the locks
        os.close(self._handle)


def _populate(handle: int, whole: torch.Tensor, first: int, end: int) -> None:
    """Allocate the pages of a mapped file; `OSError` where there is no memory."""
    first = first // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    address, size = ctypes.c_void_p(whole.data_ptr() + first), ctypes.c_size_t(end - first)
    if not libc.madvise(address, size, _MADV_POPULATE_WRITE):
        return
    code = ctypes.get_errno()
    if code != errno.EINVAL:  # Linux knows it since 5.14
        raise OSError(code, os.strerror(code))
    os.posix_fallocate(handle, first, end - first)


def _refused(num_bytes: int, error: OSError) -> CapacityError:
    return CapacityError(
        f"cannot get {num_bytes / 1e9:.3g} GB of shared memory for weights ({error.strerror}); raise the limit that "
        "this process runs under (container, ulimit -f), lower the cpu share of weights, or take fewer devices"
    )
