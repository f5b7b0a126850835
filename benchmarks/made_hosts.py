"""Simulated hosts that compute nothing and have a simulated clock, for programs that measure the driver's work."""

from __future__ import annotations

import heapq
import itertools
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from helm.common.request import Request

from engine.errors import EngineError
from engine.hosts.host import Host, Loss
from engine.hosts.messages import Alive, HostOpened, HostSwept, HostTells, Leaving, Opening, Vouched
from engine.job import Job
from engine.schedule.timing import SweepTiming
from engine.workers.handing_out.sharing_out import Room
from engine.workers.messages import Done, Entered
from engine.workers.packing import PackedCompletions, PackedJobs
from flexgen_helm.helm.requests.asked import Work

TOKENS_S = 500
"""Tokens per second that a host computes: a sweep of a hundred requests takes twenty seconds of its time."""
ALIVE_S = 20.0
RUN = 100
"""Requests with the same prefix, as in a HELM run."""
_TIMING = SweepTiming(
    begun=0.0,
    host_s=0.0,
    sweep_s=1.0,
    load_s=0.0,
    link_s=0.0,
    prefill_rows=1,
    decode_rows=0,
    num_sequences=1,
    new_tokens=1,
    device="made",
)
_REQUEST = Request(model="made/made", model_deployment="made/made", prompt="")
_TOKENS = tuple(range(50_000 + RUN))
"""One object per token, as in a sweep of a suite."""
IDENTITY = {"files": "f" * 64, "source": "s" * 64, "dtype": "bfloat16", "weights": "w" * 64}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The parameters of a simulation."""

    hosts: int
    requests: int
    sweep: int
    """Requests in a host's sweep."""
    shared: int
    own: int
    """Tokens of a prompt besides those shared by a run."""
    loss: float
    """Probability that a host is lost during a sweep."""
    seed: int = 0

    @property
    def least_s(self) -> float:
        """Time that all hosts together need if none waits and each prefix is computed once."""
        return (self.requests * self.own + self.requests / RUN * self.shared) / TOKENS_S / self.hosts

    @property
    def text_bytes(self) -> int:
        """Approximate bytes of a request's text, and of its prompt as token ids."""
        return (5 + 8) * (self.shared + self.own)

    def job(self, number: int) -> Job:
        """Make the job of a request: its run's number, its run's tokens, its own tokens."""
        run = number // RUN
        head = run % 50_000, run // 50_000, *((run * 7 + place) % 50_000 for place in range(self.shared - 2))
        own = 50_000 + number % RUN, *((number * 11 + place) % 50_000 for place in range(self.own - 1))
        return Job(prompt=tuple(_TOKENS[token] for token in head + own), max_new_tokens=1)

    def work(self, number: int) -> Work:
        """Make a request as a sweep does: its text only in the key, with four letters per token."""
        job = self.job(number)
        text = " ".join(f"{token:x}" for token in job.prompt)
        key = {"chat_template": None, "client": "flexgen_helm", "prompt": text, "max_tokens": 1, "temperature": 0.0}
        return Work(name=str(number), request=_REQUEST, key=key, places=[number], ids=tuple(job.prompt), jobs=[job])


class Clock:
    """The simulated clock and its future events."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def at(self, seconds: float, do: Callable[[], None]) -> None:
        """Call `do` in so many simulated seconds."""
        with self._lock:
            heapq.heappush(self._events, (self.now + seconds, next(self._numbers), do))

    def step(self) -> None:
        """Run the next event."""
        with self._lock:
            self.now, _, do = heapq.heappop(self._events)
        do()


@dataclass
class Tally:
    """What the hosts have done."""

    sweeps: int = 0
    tokens: int = 0
    jobs: int = 0
    """Jobs computed, including those computed again."""
    losses: Counter[str] = field(default_factory=Counter)
    made_s: float = 0.0
    """Processor seconds that the simulation of hosts took."""
    busy: int = 0
    """Hosts that are computing a sweep."""
    delivered: int = 0
    """Jobs that hosts have answered, including answers that nobody waited for."""


class MadeHost:
    """A host whose sweep takes as long as its tokens say, and whose answers are "B"."""

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self._world = world
        self._has: deque[tuple[int, tuple[int, int]]] = deque()
        self._known: set[tuple[int, int]] = set()
        """Prefixes of the last sweep."""
        self._is_busy = self._is_leaving = self._is_gone = self._is_silent = False
        self._tell: Callable[[HostTells], None]
        self._ended: Callable[[str], None]

    def open(self, opening: Opening, tell: Callable[[HostTells], None], ended: Callable[[str], None]) -> None:
        """Open at once."""
        self._tell, self._ended = tell, ended
        self._world.clock.at(0.0, self._opened)

    def ask(self, call: int, jobs: PackedJobs) -> None:
        """Accept jobs."""
        start = time.thread_time()
        begins = [0, *jobs.ends.tolist()[:-1]]
        ids = jobs.ids
        self._has.extend(
            (number, (int(ids[begin]), int(ids[begin + 1])))
            for number, begin in zip(jobs.numbers.tolist(), begins, strict=True)
        )
        if not self._is_busy and not self._is_gone:
            self._is_busy = True
            self._world.clock.at(0.0, self._begin)
        self._world.tally.made_s += time.thread_time() - start

    def drop(self, call: int) -> None:
        """Do nothing: jobs are not cancelled."""

    def leave(self) -> None:
        """End after the current sweep."""
        self._is_leaving = True
        if not self._is_busy:
            self._world.clock.at(0.0, lambda: self._end("it was told to leave"))

    def kill(self) -> None:
        """End at once."""
        self._is_gone = True

    def _opened(self) -> None:
        self._tell(self._world.opened)
        self._tell(Vouched(digest=None))
        self._alive()

    def _alive(self) -> None:
        if not self._is_gone and not self._is_silent:
            self._tell(Alive())
            self._world.clock.at(ALIVE_S, self._alive)

    def _begin(self) -> None:
        if self._is_gone or self._is_silent:
            return
        if self._is_leaving or not self._has:
            self._is_busy = False
            if self._is_leaving:
                self._end("it was told to leave")
            return
        start, world = time.thread_time(), self._world
        sweep = [self._has.popleft() for _ in range(min(world.setting.sweep, len(self._has)))]
        prefixes = {prefix for _, prefix in sweep}
        tokens = len(prefixes - self._known) * world.setting.shared + len(sweep) * world.setting.own
        self._known = prefixes
        world.tally.sweeps += 1
        world.tally.busy += 1
        world.tally.tokens += tokens
        world.tally.jobs += len(sweep)
        numbers = np.array([number for number, _ in sweep])
        world.tally.made_s += time.thread_time() - start
        how = world.fate()
        if how is not None:
            world.clock.at(tokens / TOKENS_S / 2, lambda: self._suffer(how))
        world.clock.at(tokens / TOKENS_S, lambda: self._done(numbers))
        self._tell(Entered(numbers=numbers))

    def _done(self, numbers: Any) -> None:
        self._world.tally.busy -= 1
        if self._is_gone or self._is_silent:
            return
        start, count = time.thread_time(), len(numbers)
        each = np.arange(1, count + 1)
        done = PackedCompletions(
            numbers=numbers,
            texts=("B",) * count,
            tokens=np.full(count, 33, dtype=np.int32),
            token_ends=each,
            logprobs=np.full(count, -0.1),
            prompt_logprobs=np.zeros(0),
            prompt_greedy=np.zeros(0, dtype=bool),
            scored=np.full(count, -1),
            reasons=np.full(count, 2),
            end_tokens=np.full(count, -1),
            likeliest={},
            errors={},
        )
        self._world.tally.delivered += count
        self._world.tally.made_s += time.thread_time() - start
        self._tell(HostSwept(timing=_TIMING, ago_s=1.0))
        self._tell(Done(completions=done))
        self._begin()

    def _suffer(self, how: str) -> None:
        if self._is_gone or self._is_leaving:
            return
        self._world.tally.losses[how] += 1
        if how == "silent":
            self._is_silent = True
        elif how == "leaves":
            self._tell(Leaving(why="the machine is taken back"))
        else:
            self._end("killed")

    def _end(self, how: str) -> None:
        if not self._is_gone:
            self._is_gone = True
            self._ended(how)


class World:
    """Supplies hosts, replaces lost ones, and advances the simulated time."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.clock = Clock()
        self.tally = Tally()
        room = Room(rows=setting.sweep * (setting.own + setting.shared), jobs=setting.sweep)
        self.opened = HostOpened(
            devices=("made",),
            versions={},
            identity=dict(IDENTITY),
            window=None,
            vocab_size=100_000,
            pad_token=0,
            sweep=room,
        )
        self._dice = random.Random(setting.seed)
        self._names = itertools.count()
        self._join: Callable[[Host], None]

    def fate(self) -> str | None:
        """Draw what happens to a host during a sweep."""
        if self._dice.random() >= self.setting.loss:
            return None
        return self._dice.choice(["dies", "silent", "leaves"])

    def begin(self, join: Callable[[Host], None], fail: Callable[[EngineError], None]) -> None:
        """Start all hosts within ten simulated seconds."""
        self._join = join
        for place in range(self.setting.hosts):
            self.clock.at(10.0 * place / self.setting.hosts, self._bring)

    def lost(self, host: Host, loss: Loss) -> bool:
        """Start a replacement in half a simulated minute."""
        self.clock.at(30.0, self._bring)
        return True

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    def _bring(self) -> None:
        self._join(MadeHost(f"host{next(self._names)}", self))
