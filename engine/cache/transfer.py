"""Moves keys and values between the device and the other tiers, on streams of its own, during computation."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from engine.memory import accelerator
from engine.planning.limits import STAGING_BUFFERS


class KVTransfer:
    """Ordered copies to and from a device with streams; on other devices plain copies.

    A fetch lands in one of `STAGING_BUFFERS` buffers in turn: its rows stay valid until as many further fetches are
    started.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._fetch = accelerator.new_stream(device)
        self._store = accelerator.new_stream(device)
        self._buffers: list[torch.Tensor | None] = [None] * STAGING_BUFFERS
        self._turn = 0
        self._scatterer = ThreadPoolExecutor(1, thread_name_prefix="flexgen-scatter")
        self._scattering: list[Future[None]] = []

    @property
    def is_asynchronous(self) -> bool:
        """Whether fetching in advance is of any use."""
        return self._fetch is not None

    def settle(self) -> None:
        """Wait until all stored rows have arrived: from then on they may be read, or moved."""
        if self._store is not None:
            self._store.synchronize()
        scattering, self._scattering = self._scattering, []
        for each in scattering:
            each.result()

    def store(self, pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy new rows from the device to their places, given as (rows, place) pairs, at least one."""
        if self._store is None:
            for rows, place in pieces:
                place.copy_(rows)
            return
        self._store.wait_stream(accelerator.current_stream(self._device))
        with accelerator.on_stream(self._store, self._device):
            for rows, place in pieces:
                place.copy_(rows, non_blocking=True)
                accelerator.keep_for(rows, self._store)

    def scatter(self, rows: torch.Tensor, table: torch.Tensor, slots: torch.Tensor) -> None:
        """Copy new rows from the device to single rows, given by `[stored]` row numbers, of a table on another tier.

        The device transfers them in one copy, whatever their number; a host thread writes them to their rows.
        """
        if self._store is None:
            put_rows(rows.cpu(), table, slots)
            return
        here = accelerator.page_locked(*rows.shape, dtype=rows.dtype)
        self._store.wait_stream(accelerator.current_stream(self._device))
        with accelerator.on_stream(self._store, self._device):
            here.copy_(rows, non_blocking=True)
            arrival = self._store.record_event()
        accelerator.keep_for(rows, self._store)

        def put() -> None:
            arrival.synchronize()
            put_rows(here, table, slots)

        self._scattering.append(self._scatterer.submit(put))

    def fetch(self, pieces: list[torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """Start to copy pieces `[rows, …]`, at least one, into a staging buffer, where they are concatenated.

        Returns its rows with the event of their arrival.
        """
        assert self._fetch is not None
        self._turn = (self._turn + 1) % STAGING_BUFFERS
        like, counts = pieces[0], [rows.shape[0] for rows in pieces]  # `len` of a tensor takes the time of a copy
        num_rows = sum(counts)
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
            for place, rows in zip(staged.split(counts), pieces, strict=True):
                place.copy_(rows, non_blocking=True)
            return staged, self._fetch.record_event()

    def await_arrival(self, arrival: Any) -> None:
        """Make the computation stream wait for a fetch."""
        accelerator.current_stream(self._device).wait_event(arrival)

    def close(self) -> None:
        """Stop the thread, and return when no copy to memory that may be freed is under way."""
        self._scatterer.shutdown(wait=True, cancel_futures=True)
        if self._store is not None:
            self._store.synchronize()


def put_rows(rows: torch.Tensor, table: torch.Tensor, slots: torch.Tensor) -> None:
    """Write rows of host memory to rows `slots` (int64, without duplicates) of a table there.

    It uses numpy, on this thread alone: torch's worker threads, once done, spin for milliseconds on cores that
    attention on the host and the launching of kernels need.
    """
    table.view(torch.uint8).numpy()[slots.numpy()] = rows.view(torch.uint8).numpy()
