"""Memory of the three tiers: device, page-locked host memory of exact size, and unnamed temporary files."""

from __future__ import annotations

import ctypes
import mmap
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch

from engine.errors import CapacityError, ConfigError
from engine.memory import accelerator
from engine.memory.cores import usable_cores
from engine.memory.disk.file import BLOCK, DiskFile
from engine.memory.disk.io import DiskIO
from engine.memory.paths import existing_parent, network_file_system
from engine.memory.tiers import TIERS, Tier

_TOUCH_BYTES = 64 << 20


class Arena:
    """Allocates flat byte tensors on device and host, and files on disk, counts them, and frees them.

    Host memory for a CUDA device is mapped at its exact size and page-locked by `cudaHostRegister`: PyTorch's own
    pinned allocator rounds every block up to a power of two. Files of the disk tier have no name, so the system frees
    them however the process ends.
    """

    def __init__(self, device: torch.device, *, pin: bool = True, offload_dir: str | None = None) -> None:
        self.device = device
        self.offload_dir = offload_dir
        self.pinned = pin and accelerator.can_lock_pages(device)
        self.num_bytes: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        """The bytes that are allocated, by tier."""
        self._blocks: dict[int, tuple[Tier, int, bool]] = {}
        """Tier, bytes and whether pages are locked, by address."""
        self._files: dict[DiskFile, int] = {}
        self._opened: dict[Path, DiskFile] = {}
        self._io: DiskIO | None = None
        self._lock = threading.Lock()

    @property
    def io(self) -> DiskIO:
        """The threads that read and write the files."""
        with self._lock:
            if self._io is None:
                self._io = DiskIO()
            return self._io

    def check_offload_dir(self) -> None:
        """Create `offload_dir`; raises `ConfigError` where it cannot be written, warns about network file systems."""
        assert self.offload_dir is not None
        DiskFile.create(self.offload_dir, 0).close()
        kind = network_file_system(self.offload_dir)
        if kind is not None:
            warnings.warn(
                f"offload-dir {self.offload_dir} is on a network file system ({kind}): every sweep waits for it; "
                "name a directory on a local disk",
                stacklevel=2,
            )

    def file(self, num_bytes: int) -> DiskFile:
        """Create a file in `offload_dir` with room for `num_bytes`.

        Raises `ConfigError` where there is no `offload_dir` or it cannot be written, `CapacityError` where the disk is
        full.
        """
        if self.offload_dir is None:
            raise ConfigError("something is placed on disk but there is no offload-dir; name a directory for it")
        file = DiskFile.create(self.offload_dir, num_bytes)
        with self._lock:
            self._files[file] = num_bytes
            self.num_bytes["disk"] += num_bytes
        return file

    def grow_file(self, file: DiskFile, num_bytes: int) -> None:
        """Enlarge a file created by `file`; `CapacityError` where the disk is full."""
        assert self.offload_dir is not None
        file.grow(self.offload_dir, num_bytes)
        with self._lock:
            self.num_bytes["disk"] += num_bytes - self._files[file]
            self._files[file] = num_bytes

    def opened(self, path: Path) -> DiskFile:
        """Open an existing file, once, until `close`; it is not counted."""
        with self._lock:
            if path not in self._opened:
                self._opened[path] = DiskFile.open(path)
            return self._opened[path]

    def is_on_same_disk(self, path: Path) -> bool:
        """Whether `path` is in the file system of `offload_dir`."""
        if self.offload_dir is None:
            return False
        return path.stat().st_dev == Path(existing_parent(self.offload_dir)).stat().st_dev

    def empty(self, num_bytes: int, tier: Literal["device", "host"]) -> torch.Tensor:
        """Allocate a uint8 tensor `[num_bytes]` on `tier`."""
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=self.device if tier == "device" else "cpu")
        if tier == "device":
            tensor = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        elif self.pinned:
            tensor = _page_locked(num_bytes)
        else:
            tensor = torch.empty(num_bytes, dtype=torch.uint8)
        return self._counted(tensor, tier, tier == "host" and self.pinned)

    def shared(self, tensor: torch.Tensor, tier: Literal["device", "host"]) -> torch.Tensor:
        """Count a uint8 tensor of shared memory as a part of `tier`, and page-lock it as `empty` does."""
        if tensor.numel() == 0:
            return tensor
        locked = tier == "host" and self.pinned
        return self._counted(_locked(tensor) if locked else tensor, tier, locked)

    def staging(self, num_bytes: int) -> torch.Tensor:
        """Allocate a uint8 tensor `[num_bytes]` in host memory for direct reads and fast copies to the device.

        It is aligned to pages, and page-locked where the device gains by it, whatever the policy says about weights.
        """
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        locked = accelerator.can_lock_pages(self.device)
        if locked:
            tensor = _page_locked(num_bytes)
        elif accelerator.has_streams(self.device):
            whole = accelerator.page_locked(num_bytes + BLOCK, dtype=torch.uint8)
            tensor = whole[-whole.data_ptr() % BLOCK :][:num_bytes]
        else:
            tensor = torch.frombuffer(_map(num_bytes), dtype=torch.uint8)
        return self._counted(tensor, "host", locked)

    def _counted(self, tensor: torch.Tensor, tier: Tier, locked: bool) -> torch.Tensor:
        with self._lock:
            self.num_bytes[tier] += tensor.numel()
            self._blocks[tensor.data_ptr()] = tier, tensor.numel(), locked
        return tensor

    def free(self, tensor: torch.Tensor) -> None:
        """Free a tensor of `empty`; the caller must keep no view of it, but queued device work may still use it."""
        if tensor.numel():
            self._release(tensor.data_ptr())

    def close(self) -> None:
        """Free everything; no file access may be under way."""
        if self._io is not None:
            self._io.close()
        for file in [*self._files, *self._opened.values()]:
            file.close()
        self._files.clear()
        self._opened.clear()
        self.num_bytes["disk"] = 0
        for pointer in list(self._blocks):
            self._release(pointer)

    def _release(self, pointer: int) -> None:
        tier, num_bytes, locked = self._blocks.pop(pointer)
        self.num_bytes[tier] -= num_bytes
        if tier == "host":  # copies from and to it, of whatever stream, do not keep the memory themselves
            accelerator.synchronize(self.device)
        if locked:
            # Before the mapping goes: the driver would otherwise keep the pages of a later mapping at this address.
            accelerator.unlock_pages(pointer)


def _map(num_bytes: int) -> mmap.mmap:
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # fewer pages to lock, and to look up when rows are read that lie far apart
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _page_locked(num_bytes: int) -> torch.Tensor:
    tensor = torch.frombuffer(_map(num_bytes), dtype=torch.uint8)

    def touch(first: int) -> None:
        ctypes.memset(tensor.data_ptr() + first, 0, min(_TOUCH_BYTES, num_bytes - first))

    # Registering takes the time of the page faults, unless several threads have had them before.
    with ThreadPoolExecutor(min(16, usable_cores())) as pool:
        list(pool.map(touch, range(0, num_bytes, _TOUCH_BYTES)))
    return _locked(tensor)


def _locked(tensor: torch.Tensor) -> torch.Tensor:
    """Lock the pages of mapped memory that are resident."""
    code = accelerator.lock_pages(tensor.data_ptr(), tensor.numel())
    if code:
        raise CapacityError(
            f"cannot page-lock {tensor.numel() / 1e9:.1f} GB of host memory (CUDA error {code}); "
            "raise the locked-memory limit, lower the cpu share, or set pin-weight: false"
        )
    return tensor
