"""Shows the progress of a run: one line rewritten in place on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

TERMINAL_INTERVAL_S = 0.2
PLAIN_INTERVAL_S = 10.0


class StatusLine:
    """A status line: rewritten in place on a terminal, written as a new line each time elsewhere."""

    def __init__(self, stream: TextIO | None) -> None:
        """Write to `stream`, stderr by default."""
        self._stream = sys.stderr if stream is None else stream
        self.in_place = self._stream.isatty()
        self._width = 0

    def show(self, line: str) -> None:
        """Show `line`, in place of the previous one on a terminal."""
        if self.in_place:
            self._write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._write(line + "\n")

    def end(self) -> None:
        """Keep the line that is shown, and continue below it."""
        if self._width:
            self._write("\n")
            self._width = 0

    def clear(self) -> None:
        """Erase the line that is shown in place."""
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class Progress:
    """Shows requests and tokens per second and the time left of the current run.

    Tokens are those that the engine computed: of prompts and completions. Answers from a cache count as done, but
    neither for the speed nor for the time left.
    """

    def __init__(
        self, num_runs: int = 1, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Write to `stream`, stderr by default; `clock` gives seconds."""
        self.notes: list[str] = []
        """Lines for the user to read at the end."""
        self._num_runs = num_runs
        self._clock = clock
        self._status = StatusLine(stream)
        self._interval_s = TERMINAL_INTERVAL_S if self._status.in_place else PLAIN_INTERVAL_S
        self._shown_s = float("-inf")
        self._run = 0
        self._name = ""
        self._start_s: float | None = None
        self._now_s = 0.0
        self._done = self._total = self._tokens = self._cached = 0
        self._past_s = 0.0
        self._past_computed = self._past_cached = self._past_tokens = 0

    def begin(self, name: str) -> None:
        """Begin the next run."""
        self._bank()
        self._run += 1
        self._name = name

    def __call__(self, done: int, total: int, tokens: int) -> None:
        """Record that `done` of the run's `total` requests are answered, for which `tokens` tokens were computed."""
        self._now_s = self._clock()
        if self._start_s is None:
            self._start_s, self._cached = self._now_s, done
        self._done, self._total, self._tokens = done, total, tokens
        if self._now_s - self._shown_s >= self._interval_s or done == total:
            self._shown_s = self._now_s
            if done or self._status.in_place:
                self._status.show(self.line())

    def line(self) -> str:
        """Describe the current run in one line."""
        line = f"run {self._run}/{self._num_runs} {self._name}: requests {self._done}/{self._total}"
        elapsed_s, computed = self._elapsed_s, self._done - self._cached
        if elapsed_s <= 0 or computed <= 0:
            return line
        line = f"{line}, {computed / elapsed_s:.1f}/s, {self._tokens / elapsed_s:.0f} tokens/s"
        left = self._total - self._done
        return f"{line}, {clock(left * elapsed_s / computed)} left" if left else line

    def close(self) -> str:
        """End the display; return the throughput of all runs in one line."""
        self._bank()
        self._status.end()
        requests = f"{self._past_computed + self._past_cached} requests"
        if not self._past_computed:
            return f"{requests}, all answered from the cache" if self._past_cached else "no requests"
        if self._past_cached:
            requests += f" ({self._past_cached} of them from the cache)"
        past_s = max(self._past_s, 1e-9)
        speed = f"{self._past_computed / past_s:.1f} requests/s, {self._past_tokens / past_s:.0f} tokens/s"
        return f"{requests}, {self._past_tokens} tokens in {self._past_s:.1f} s with loading: {speed}"

    @property
    def num_computed(self) -> int:
        """Number of requests of this command that were not answered from a cache."""
        return self._past_computed + self._done - self._cached

    @property
    def _elapsed_s(self) -> float:
        return 0.0 if self._start_s is None else self._now_s - self._start_s

    def _bank(self) -> None:
        self._past_s += self._elapsed_s
        self._past_computed += self._done - self._cached
        self._past_cached += self._cached
        self._past_tokens += self._tokens
        self._start_s = None
        self._done = self._total = self._tokens = self._cached = 0


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: `1:02:03`, `0:09`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
