"""Measures how long a sweep's computation has waited for weights being copied to the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from engine.memory import accelerator


class LinkWait:
    """A clock that runs while the computation waits: device events where the device has streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the computation is made to wait for an arrival."""
        if accelerator.has_streams(self._device):
            begun = accelerator.timed_event(self._device)
            yield
            self._events.append((begun, accelerator.timed_event(self._device)))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def take(self) -> float:
        """The seconds of waiting since the last call; the device must have finished the work queued meanwhile."""
        seconds = self._seconds + sum(accelerator.seconds_between(*pair) for pair in self._events)
        self._seconds = 0.0
        self._events.clear()
        return seconds
