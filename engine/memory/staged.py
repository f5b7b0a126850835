"""Copies of pageable or mapped bytes to a device with streams."""

from __future__ import annotations

from typing import Any

import torch

from engine.memory import accelerator

_STAGE_BYTES = 64 << 20


class StagedCopies:
    """Copies through two page-locked buffers in turn, which are allocated at first use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stage: list[tuple[torch.Tensor, Any]] = []

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy uint8 host bytes to the device, in its current stream; the host waits for all pieces but the last."""
        if not self._stage:
            self._stage = [(accelerator.page_locked(_STAGE_BYTES, dtype=torch.uint8), None) for _ in range(2)]
        for turn, first in enumerate(range(0, source.numel(), _STAGE_BYTES)):
            buffer, copied = self._stage[turn % 2]
            if copied is not None:
                copied.synchronize()
            size = min(_STAGE_BYTES, source.numel() - first)
            buffer[:size].copy_(source[first : first + size])
            target[first : first + size].copy_(buffer[:size], non_blocking=True)
            self._stage[turn % 2] = buffer, accelerator.current_stream(self._device).record_event()
