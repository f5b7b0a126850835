"""Progress of a suite: lines in place on a terminal, a line per minute elsewhere, JSON lines for machines."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TextIO

from flexgen_helm.helm.scores import short_name
from flexgen_helm.sweeps.device_time import DeviceTime
from flexgen_helm.sweeps.log import JsonLog, logger
from flexgen_helm.terminal.live import LiveBlock, Row
from flexgen_helm.terminal.progress import StatusLine, clock

TERMINAL_INTERVAL_S = 0.5
PLAIN_INTERVAL_S = 60.0
_MOST_ACTIVE = 3
"""Runs in progress that are shown on a terminal: those closest to their end."""


@dataclass(eq=False)
class Standing:
    """The progress of a suite. Tokens are those of requests that the engine computes."""

    num_runs: int
    suite: str = ""
    runs_ended: int = 0
    doing: str = "starting"
    """What is being done, in a few words."""
    is_loading: bool = False
    """Whether the model is still being loaded and nothing is computed."""
    requests: int = 0
    requests_done: int = 0
    tokens: int = 0
    """The tokens of the current model: of prompts, and the most that are to be generated."""
    tokens_done: int = 0
    """The tokens of answered requests, counted as in `tokens`."""
    num_workers: Callable[[], int] = lambda: 0
    """The number of other machines that work on it."""
    active: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Requests done and in total, for the runs in progress."""

    def ended(self, deployment: str) -> None:
        """All of a model's requests are answered."""
        self.doing, self.is_loading, self.active = f"{deployment} done", False, {}


class SweepProgress:
    """Shows a `Standing` now and then, from a thread of its own; a context manager."""

    def __init__(
        self,
        standing: Standing,
        json_log: JsonLog,
        speed: Callable[[], tuple[float, float, float | None]],
        devices: Callable[[], Sequence[DeviceTime]],
        stream: TextIO | None = None,
    ) -> None:
        """Show `standing` on `stream`, stderr by default.

        `speed` returns seconds of computing, tokens computed, and the fraction of the limit if it is known; `devices`
        returns how the time of each device was spent.
        """
        self.standing = standing
        self._json_log = json_log
        self._speed = speed
        self._devices = devices
        stream = sys.stderr if stream is None else stream
        self._status = StatusLine(stream)
        self._live = LiveBlock(stream) if LiveBlock.can_be_on(stream) else None
        self._interval_s = TERMINAL_INTERVAL_S if self._status.in_place else PLAIN_INTERVAL_S
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show_now_and_then, name="flexgen-progress", daemon=True)

    def __enter__(self) -> SweepProgress:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._status.clear()
        if self._live is not None:
            self._live.clear()

    def line(self) -> str:
        """The suite's progress in one line."""
        now = self.standing
        parts = [f"runs {now.runs_ended}/{now.num_runs}", self._doing()]
        if workers := now.num_workers():
            parts.append(f"{workers} worker{'s' * (workers != 1)}")
        if now.requests:
            parts.append(f"requests {now.requests_done}/{now.requests}")
        return ", ".join([*parts, *self._pace()])

    def rows(self) -> list[Row]:
        """The suite's progress in a few lines."""
        now = self.standing
        rows = [Row("suite", now.suite), Row("now", self._doing())]
        rows += [
            Row(label, f"{done}/{total}", done / total)
            for label, done, total in (
                ("runs", now.runs_ended, now.num_runs),
                ("requests", now.requests_done, now.requests),
            )
            if total
        ]
        if pace := ", ".join(self._pace()):
            rows.append(Row("speed", pace))
        rows += [Row("device", str(each)) for each in self._devices()]
        active = sorted(now.active.copy().items(), key=lambda item: item[1][0] - item[1][1])[-_MOST_ACTIVE:]
        return rows + [Row("run", f"{short_name(name)} {done}/{total}") for name, (done, total) in reversed(active)]

    def _doing(self) -> str:
        now = self.standing
        return f"loading {now.doing}" if now.is_loading and not self._speed()[0] else now.doing

    def _pace(self) -> Iterator[str]:
        """Tokens per second, the fraction of the limit and the time left, as far as they are known."""
        seconds, tokens, fraction = self._speed()
        if seconds > 0 and tokens > 0:
            yield f"{tokens / seconds:.0f} tokens/s"
        if fraction is not None:
            yield f"{fraction:.0%} of the limit"
        if (left_s := self._left_s(seconds)) is not None:
            yield f"{clock(left_s)} left"

    def say(self, text: str) -> None:
        """Show a line permanently, on a terminal only, and log it."""
        if self._status.in_place:
            self.tell(text)
        else:
            logger.info(text)

    def tell(self, text: str) -> None:
        """Show a line permanently, wherever progress is shown, and log it."""
        logger.info(text)
        if self._live is not None:
            self._live.say(text)
            return
        self._status.clear()
        self._status.show(text)
        self._status.end()

    def _left_s(self, seconds: float) -> float | None:
        """The seconds that are left for the current model, at the rate so far."""
        now = self.standing
        if seconds <= 0 or not now.tokens_done or now.tokens_done >= now.tokens:
            return None
        return seconds * (now.tokens - now.tokens_done) / now.tokens_done

    def _show_now_and_then(self) -> None:
        told = time.monotonic()
        while not self._ended.wait(self._interval_s):
            line = self.line()
            if self._live is None:
                self._status.show(line)
            else:
                self._live.show(self.rows())
            if not self._status.in_place or time.monotonic() - told >= PLAIN_INTERVAL_S:
                told = time.monotonic()
                logger.info(line)
                self._tell_machines()

    def _tell_machines(self) -> None:
        now = self.standing
        seconds, tokens, fraction = self._speed()
        self._json_log.write(
            "progress",
            doing=now.doing,
            runs_ended=now.runs_ended,
            runs=now.num_runs,
            requests_done=now.requests_done,
            requests=now.requests,
            tokens_per_s=tokens / seconds if seconds > 0 else None,
            fraction_of_limit=fraction,
            left_s=self._left_s(seconds),
            active={name: list(counts) for name, counts in now.active.copy().items()},
        )
