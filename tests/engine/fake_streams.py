"""A device with streams and page-locked memory, played by the CPU."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from engine.memory import accelerator


class Streams:
    """A device module on the CPU: what is asked of a stream is done at once; what was called is counted."""

    def __init__(self) -> None:
        self.called: Counter[str] = Counter()
        self.locked: dict[int, int] = {}
        self.limits: list[float] = []
        outer = self

        class Stream:
            def __init__(self, device: torch.device) -> None:
                outer.called["Stream"] += 1

            def __getattr__(self, name: str) -> Callable[..., object]:
                assert name in ("wait_stream", "wait_event", "record_event", "synchronize")
                outer.called[name] += 1
                return lambda *arguments: self  # an event, too, can be waited for

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing
                self._at: float | None = None

            def record(self, stream: Any) -> None:
                assert isinstance(stream, Stream)
                self._at = time.perf_counter()

            def synchronize(self) -> None:
                assert self._at is not None

            def elapsed_time(self, end: Any) -> float:
                return 1000 * float(end._at - self._at)

        self.Stream = Stream
        self.Event = Event
        self.current = Stream(torch.device("cpu"))

    def current_stream(self, device: torch.device) -> Any:
        return self.current

    def stream(self, stream: Any) -> Any:
        assert isinstance(stream, self.Stream)
        return nullcontext()

    def device(self, device: torch.device) -> Any:
        return nullcontext()

    def current_device(self) -> int:
        return 0

    def set_device(self, device: torch.device) -> None:
        self.called["set_device"] += 1

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 10**9, 2 * 10**9

    def get_device_properties(self, device: torch.device) -> Any:
        return type("Properties", (), {"total_memory": 2 * 10**9})

    def set_per_process_memory_fraction(self, fraction: float, device: torch.device) -> None:
        self.limits.append(fraction)

    def lock(self, pointer: int, num_bytes: int) -> int:
        self.locked[pointer] = num_bytes
        return 0

    def get_device_name(self, device: torch.device) -> str:
        return "Streams"


def play(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """Let the CPU be such a device."""
    streams = Streams()
    monkeypatch.setattr(accelerator, "_WITH_STREAMS", ("cpu",))
    monkeypatch.setattr(accelerator, "_module", lambda device: streams)
    monkeypatch.setattr(accelerator, "indexed", lambda device: device)
    monkeypatch.setattr(accelerator, "can_lock_pages", lambda device: True)
    monkeypatch.setattr(accelerator, "lock_pages", streams.lock)
    monkeypatch.setattr(accelerator, "unlock_pages", lambda pointer: streams.locked.pop(pointer))
    monkeypatch.setattr(accelerator, "page_locked", lambda *shape, dtype: torch.empty(*shape, dtype=dtype))
    monkeypatch.setattr(accelerator, "keep_for", lambda tensor, stream: None)
    return streams
