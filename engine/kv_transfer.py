"""Moves keys and values between the device and the other tiers beside the computation, on streams of its own."""

from __future__ import annotations

from typing import Any

import torch

from engine import accelerator

_NUM_BUFFERS = 2


class KVTransfer:
    """Ordered copies off and onto a device with streams; on other devices plain copies.

    What is brought for one micro-batch lies in one of two staging buffers in turn, so it is good until the micro-batch
    after the next one is brought.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._fetch = accelerator.new_stream(device)
        self._store = accelerator.new_stream(device)
        self._buffers: list[torch.Tensor | None] = [None] * _NUM_BUFFERS
        self._turn = 0

    @property
    def is_asynchronous(self) -> bool:
        """Whether fetching ahead is of any use."""
        return self._fetch is not None

    def begin_sweep(self) -> None:
        """Wait until what the sweep before stored has arrived: this one may read it."""
        if self._store is not None:
            self._store.synchronize()

    def store(self, rows: torch.Tensor, target: torch.Tensor) -> None:
        """Copy new rows from the device to their place."""
        if self._store is None:
            target.copy_(rows)
            return
        self._store.wait_stream(accelerator.current_stream(self._device))
        with accelerator.on_stream(self._store, self._device):
            target.copy_(rows, non_blocking=True)
        accelerator.keep_for(rows, self._store)

    def fetch(
        self, num_rows: int, pieces: list[tuple[int, torch.Tensor]], *, clear: bool = False
    ) -> tuple[torch.Tensor, Any]:
        """Start copying (first row, rows) pieces, at least one, into a staging buffer `[num_rows, …]`.

        Returns it with the event of its arrival. Rows that no piece covers hold anything finite, or zeros with `clear`:
        bytes of codes may mean anything.
        """
        assert self._fetch is not None
        self._turn = (self._turn + 1) % _NUM_BUFFERS
        like = pieces[0][1]
        size = num_rows * like.shape[1] * like.element_size()
        buffer = self._buffers[self._turn]
        if buffer is None or buffer.numel() < size:
            self._buffers[self._turn] = None
            buffer = torch.zeros(size, dtype=torch.uint8, device=self._device)
            self._buffers[self._turn] = buffer
        staged = buffer[:size].view(like.dtype).view(num_rows, -1)
        # The computation that used the buffer last has been queued by now.
        self._fetch.wait_stream(accelerator.current_stream(self._device))
        with accelerator.on_stream(self._fetch, self._device):
            if clear:
                staged.zero_()
            for first, rows in pieces:
                staged[first : first + len(rows)].copy_(rows, non_blocking=True)
            return staged, self._fetch.record_event()

    def await_arrival(self, arrival: Any) -> None:
        """Let the computation wait for a fetch."""
        accelerator.current_stream(self._device).wait_event(arrival)
