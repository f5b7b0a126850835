"""Sums over an engine's sweeps for a model: seconds by kind of work, a timeline, and the least time possible."""

from __future__ import annotations

import math
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from engine.errors import ConfigError
from engine.planning.hardware_profile import HardwareProfile
from engine.schedule.timing import SweepTiming
from flexgen_helm.helm.requests.asked import Answer
from flexgen_helm.planning.estimate import resource_seconds
from flexgen_helm.planning.model_sizes import sizes_of
from flexgen_helm.planning.roofline import Work
from flexgen_helm.planning.sizes import Sizes
from flexgen_helm.sweeps.device_time import DeviceClock, DeviceTime
from flexgen_helm.sweeps.record import MOST_POINTS, TimelinePoint, TimeSplit, thinned
from flexgen_helm.workers.running_engine import RunningEngine

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.planning.planner import Plan
    from engine.workers.remote_engine import RemoteEngine


class Tally:
    """Watches one model's part of a suite; `observe` may be called from another thread than the rest."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first_sweep: float | None = None
        """When the engine began its first sweep: it was open then, but its weights may still have been loading."""
        self.longest_s = 0.0
        """The longest of its sweeps, without waiting for weights that were still being loaded."""
        self.num_sweeps = self.prefill_rows = self.decode_rows = 0
        self.given_tokens = 0
        """The tokens given to sequences, finished or not; `new_tokens` are those of answers."""
        self.computed = self.prompt_tokens = self.prompt_rows = self.new_tokens = 0
        self._prefill_s = self._decode_s = self._load_s = self._opening_s = 0.0
        self._devices: dict[str, DeviceClock] = {}
        self._points: list[TimelinePoint] = []
        self._engine: RunningEngine | None = None
        self._limit_of: _Limit | None = None
        self._lock = threading.Lock()

    def restart(self) -> None:
        """Let the model's time begin now."""
        self.started = time.perf_counter()

    def observe(self, engine: RunningEngine, timing: SweepTiming) -> None:
        """Count a sweep. Its seconds are divided between prefill and decode by their rows."""
        rows = max(1, timing.prefill_rows + timing.decode_rows)
        computing = timing.sweep_s - timing.load_s
        with self._lock:
            if self.first_sweep is None:
                self.first_sweep, self._engine = timing.begun, engine
                self._opening_s = max(0.0, timing.begun - self.started)
            self._devices.setdefault(timing.device, DeviceClock(timing.device, timing.begun)).add(timing)
            self._load_s += timing.load_s
            self.longest_s = max(self.longest_s, timing.host_s + computing)
            self._prefill_s += computing * timing.prefill_rows / rows
            self._decode_s += computing * timing.decode_rows / rows
            self.num_sweeps += 1
            self.prefill_rows += timing.prefill_rows
            self.decode_rows += timing.decode_rows
            self.given_tokens += timing.new_tokens
            self._points.append(
                TimelinePoint(
                    at=max(0.0, timing.begun - self.started),
                    seconds=timing.host_s + timing.sweep_s,
                    prefill_rows=timing.prefill_rows,
                    decode_rows=timing.decode_rows,
                    sequences=timing.num_sequences,
                    new_tokens=timing.new_tokens,
                )
            )
            if len(self._points) >= 8 * MOST_POINTS:
                self._points = list(thinned(self._points, 4 * MOST_POINTS))

    def answered(self, answer: Answer) -> None:
        """Count an answer of the engine."""
        self.computed += 1
        self.prompt_tokens += answer.prompt_tokens
        self.prompt_rows += answer.prompt_rows
        self.new_tokens += answer.new_tokens

    @property
    def saved_tokens(self) -> int:
        """Prompt tokens of answered requests that prefix sharing saved computing."""
        return max(0, self.prompt_rows - self.prefill_rows)

    @property
    def seconds(self) -> float:
        """Since the model's start."""
        return time.perf_counter() - self.started

    @property
    def computing_s(self) -> float:
        """Since the first sweep began; 0 before."""
        return 0.0 if self.first_sweep is None else time.perf_counter() - self.first_sweep

    def speed(self) -> tuple[float, float, float | None]:
        """Seconds since the first sweep began, tokens computed in them, and the limit's fraction of them."""
        seconds = self.computing_s
        return seconds, self.prompt_tokens + max(self.new_tokens, self.given_tokens), self.fraction(seconds)

    def split(self, seconds: float) -> TimeSplit:
        """How `seconds` of the model were spent; for several devices, the mean."""
        with self._lock:
            parts = (self._load_s, self._prefill_s, self._decode_s)
            load, prefill, decode = (part / max(1, len(self._devices)) for part in parts)
            load += self._opening_s
            host = max(0.0, seconds - load - prefill - decode)
            return TimeSplit(load=load, prefill=prefill, decode=decode, host=host)

    def devices(self) -> tuple[DeviceTime, ...]:
        """How the time of each device was spent, devices that failed included."""
        given_up = getattr(self._engine, "given_up", {})
        with self._lock:
            return tuple(clock.time(time.perf_counter(), given_up) for _, clock in sorted(self._devices.items()))

    @property
    def num_devices(self) -> int:
        """The number of devices that have computed sweeps."""
        return max(1, len(self._devices))

    def num_workers(self) -> int:
        """The number of other machines that have the model open now."""
        return len(getattr(self._engine, "hosts", ()))

    def given_up(self) -> dict[str, str]:
        """Devices that the engine no longer uses, and why."""
        return dict(getattr(self._engine, "given_up", {}))

    def timeline(self) -> tuple[TimelinePoint, ...]:
        """The sweeps so far, neighbours together."""
        with self._lock:
            return thinned(self._points)

    def plan(self) -> dict[str, Any]:
        """The engine's plan, or those of its workers by name; empty before it was open."""
        if (plans := getattr(self._engine, "plans", None)) is not None:
            return {name: _plain(asdict(plan)) for name, plan in plans.items()}
        found = getattr(self._engine, "plan", None)
        return {} if found is None else _plain(asdict(found))

    def deaths(self) -> tuple[str, ...]:
        """How processes of the engine ended that were replaced."""
        return tuple(getattr(self._engine, "deaths", ()))

    def limit_s(self) -> float | None:
        """The least seconds of the sweeps so far on this machine; None where its rates were not measured."""
        if self._engine is None or not hasattr(self._engine, "plan"):
            return None
        if self._limit_of is None:
            self._limit_of = _Limit(cast("Engine", self._engine))
        return self._limit_of(self)

    def fraction(self, seconds: float) -> float | None:
        """The limit as a fraction of `seconds`; None if it is not known."""
        limit_s = self.limit_s()
        return None if limit_s is None or seconds <= 0 else limit_s / seconds


class _Limit:
    """The least time of work on an engine, by the profile that `doctor --profile` stored of this machine."""

    def __init__(self, engine: Engine | RemoteEngine) -> None:
        self._plan: Plan = engine.plan
        self._gathers = getattr(engine, "gathers", False)  # the profile has no rates between GPUs
        self._profile: HardwareProfile | None = None
        with suppress(ConfigError):
            self._profile = HardwareProfile.load()
            self._sizes: Sizes = sizes_of(engine)

    def __call__(self, tally: Tally) -> float | None:
        if self._profile is None or self._gathers:
            return None
        limits, sizes, rows = self._plan.limits, self._sizes, tally.prefill_rows + tally.decode_rows
        fewest = max(
            math.ceil(rows / limits.rows_per_sweep), math.ceil((tally.computed + tally.decode_rows) / limits.seats)
        )
        sweeps = min(max(tally.num_devices, fewest), max(1, tally.num_sweeps))
        work = Work(
            sweeps=sweeps,
            flop=2.0 * sizes.layer_parameters * rows
            + 2.0 * sizes.head_parameters * (tally.computed + tally.decode_rows),
            to_device_bytes=sweeps * sizes.streamed_bytes,
            from_device_bytes=0.0,
            device_bytes=sweeps * sizes.sweep_bytes,
        )
        seconds = max(resource_seconds(work, self._profile, limits.rows_per_batch, sizes.disk_bytes).values())
        return seconds / tally.num_devices  # each has its own link and compute rates


def _plain(value: Any) -> Any:
    """Replace values that JSON lacks (infinite budgets)."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
