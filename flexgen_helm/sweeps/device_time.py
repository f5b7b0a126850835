"""How each of a model's devices spent its seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.schedule.timing import SweepTiming


@dataclass(frozen=True, kw_only=True)
class DeviceTime:
    """Seconds of one device from its first sweep on, without those in which weights were first read."""

    device: str
    sweeps: int
    computing: float
    """Seconds of computing, scheduling included, without the next two."""
    link: float
    """Seconds of waiting for weights on their way to the device."""
    helm: float
    """Seconds without work: HELM makes requests or computes metrics, or other devices have all remaining work."""
    given_up: str = ""
    """Why the device is no longer used; empty if it is."""

    def __str__(self) -> str:
        total = max(self.computing + self.link + self.helm, 1e-9)
        parts = f"computing {self.computing / total:.0%}, link {self.link / total:.0%}, HELM {self.helm / total:.0%}"
        return f"{self.device} {parts}{f', given up ({self.given_up})' if self.given_up else ''}"


class DeviceClock:
    """Adds up one device's sweeps."""

    def __init__(self, device: str, begun: float) -> None:
        """`begun`: the beginning of its first sweep, by `time.perf_counter`."""
        self._device, self._begun = device, begun
        self._sweeps = 0
        self._computing = self._link = self._load = 0.0

    def add(self, timing: SweepTiming) -> None:
        """Count a sweep."""
        self._sweeps += 1
        self._load += timing.load_s
        self._link += timing.link_s
        self._computing += timing.host_s + timing.sweep_s - timing.load_s - timing.link_s

    def time(self, now: float, given_up: Mapping[str, str]) -> DeviceTime:
        """Return the times up to `now`, by `time.perf_counter`; `given_up`: devices no longer used, and why."""
        return DeviceTime(
            device=self._device,
            sweeps=self._sweeps,
            computing=self._computing,
            link=self._link,
            helm=max(0.0, now - self._begun - self._load - self._link - self._computing),
            given_up=given_up.get(self._device) or given_up.get(self._device.partition("/")[0], ""),
        )
