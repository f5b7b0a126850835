"""Memory of the three tiers: device, page-locked host memory of exact size, and files that vanish with their owner."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from engine import accelerator
from engine.errors import CapacityError, ConfigError
from engine.placement import TIERS, Tier

_TOUCH_BYTES = 64 << 20


class Arena:
    """Hands out flat byte tensors on any tier, keeps count of them, and frees them.

    Host memory for a CUDA device is mapped at its exact size and page-locked by `cudaHostRegister`: PyTorch's own
    pinned allocator rounds every block up to a power of two. Files of the disk tier lose their name as soon as they are
    mapped, so the system frees them whatever ends the process.
    """

    def __init__(self, device: torch.device, *, pin: bool = True, offload_dir: str | None = None) -> None:
        self.device = device
        self.offload_dir = offload_dir
        self.pinned = pin and accelerator.can_lock_pages(device)
        self.num_bytes: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        """Bytes handed out and not freed, by tier."""
        self._blocks: dict[int, tuple[Tier, int]] = {}
        self._lock = threading.Lock()

    def empty(self, num_bytes: int, tier: Tier) -> torch.Tensor:
        """A new uint8 tensor `[num_bytes]` on `tier`."""
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=self.device if tier == "device" else "cpu")
        if tier == "device":
            tensor = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        elif tier == "disk":
            tensor = self._map_file(num_bytes)
        elif self.pinned:
            tensor = _page_locked(num_bytes)
        else:
            tensor = torch.empty(num_bytes, dtype=torch.uint8)
        with self._lock:
            self.num_bytes[tier] += num_bytes
            self._blocks[tensor.data_ptr()] = tier, num_bytes
        return tensor

    def free(self, tensor: torch.Tensor) -> None:
        """Give back a tensor of `empty`; the caller keeps no view of it."""
        if tensor.numel():
            self._release(tensor.data_ptr())

    def close(self) -> None:
        """Give back everything."""
        for pointer in list(self._blocks):
            self._release(pointer)

    def _release(self, pointer: int) -> None:
        tier, num_bytes = self._blocks.pop(pointer)
        self.num_bytes[tier] -= num_bytes
        if tier == "host" and self.pinned:
            # Before the mapping goes: the driver would otherwise keep the pages of a later mapping at this address.
            accelerator.unlock_pages(pointer)

    def _map_file(self, num_bytes: int) -> torch.Tensor:
        if self.offload_dir is None:
            raise ConfigError("something is placed on disk but there is no offload-dir; name a directory for it")
        try:
            Path(self.offload_dir).mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix="flexgen-", dir=self.offload_dir)
        except OSError as error:
            raise ConfigError(f"offload-dir {self.offload_dir} is not writable: {error.strerror}") from None
        try:
            # Claims the blocks now: a write to a mapped page that finds the disk full would kill the process.
            os.posix_fallocate(handle, 0, num_bytes)
            return torch.from_file(name, shared=True, size=num_bytes, dtype=torch.uint8)
        except OSError as error:
            free = os.statvfs(self.offload_dir).f_bavail * os.statvfs(self.offload_dir).f_frsize
            raise CapacityError(
                f"offload-dir {self.offload_dir}: no room for {num_bytes / 1e9:.1f} GB ({free / 1e9:.1f} GB free, "
                f"{error.strerror}); lower the disk share or name another directory"
            ) from None
        finally:
            os.close(handle)
            os.unlink(name)


def _page_locked(num_bytes: int) -> torch.Tensor:
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # fewer pages to lock, and to look up when rows are read that lie far apart
        pages.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(pages, dtype=torch.uint8)

    def touch(first: int) -> None:
        ctypes.memset(tensor.data_ptr() + first, 0, min(_TOUCH_BYTES, num_bytes - first))

    # Registering takes the time of the page faults, unless several threads have had them before.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(touch, range(0, num_bytes, _TOUCH_BYTES)))
    code = accelerator.lock_pages(tensor.data_ptr(), num_bytes)
    if code:
        raise CapacityError(
            f"cannot page-lock {num_bytes / 1e9:.1f} GB of host memory (CUDA error {code}); "
            "raise the locked-memory limit, lower the cpu share, or set pin-weight: false"
        )
    return tensor
