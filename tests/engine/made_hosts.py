"""Hosts of one process whose answers follow from the jobs alone, for tests of who has which jobs."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from engine.errors import EngineError
from engine.hosts.driver import Driver
from engine.hosts.expected import Expected
from engine.hosts.host import Host, Loss
from engine.hosts.messages import Alive, HostOpened, HostTells, Leaving, Opening, Vouched
from engine.job import Completion, Job
from engine.policy import Policy
from engine.workers.handing_out.sharing_out import Room
from engine.workers.messages import Done, Entered, Fault
from engine.workers.packing import PackedCompletions, PackedJobs

VERSIONS = {"flexgen-helm": "0"}
IDENTITY: Mapping[str, Any] = {"files": "f" * 64, "source": "s" * 64, "dtype": "float32"}
EXPECTED = Expected(identity=dict(IDENTITY), versions=VERSIONS)
DIGEST = "d" * 64
SWEEP = 4


def answer(job: Job) -> Completion:
    """What a host answers."""
    return Completion(text=str(list(job.prompt)), tokens=tuple(job.prompt), logprobs=(0.0,) * len(job.prompt))


class MadeHost:
    """A host that sweeps when it is told to, in the thread that tells it."""

    def __init__(self, name: str, *, digest: str = DIGEST, deadly: int | None = None, **opened: Any) -> None:
        """`deadly`: a token whose job ends the host when it is computed."""
        self.name = name
        self.digest, self.deadly, self.told_opened = digest, deadly, opened
        self.has: list[tuple[int, Job]] = []
        self.computed: list[int] = []
        self.is_gone = self.is_leaving = False
        self._tell: Callable[[HostTells], None]
        self._ended: Callable[[str], None]

    def open(self, opening: Opening, tell: Callable[[HostTells], None], ended: Callable[[str], None]) -> None:
        self._tell, self._ended = tell, ended

    def ask(self, call: int, jobs: PackedJobs) -> None:
        self.has += jobs.unpack()

    def drop(self, call: int) -> None:
        pass

    def leave(self) -> None:
        self.is_leaving = True
        self.sweep()
        self.die("it was told to leave")

    def kill(self) -> None:
        self.is_gone = True

    def begin(self) -> None:
        """Be open."""
        told: dict[str, Any] = {"devices": ("cpu",), "versions": VERSIONS, "identity": dict(IDENTITY)}
        told |= {"window": 64, "vocab_size": 1000, "pad_token": 0, "sweep": Room(rows=40, jobs=SWEEP)}
        self._tell(HostOpened(**(told | self.told_opened)))

    def vouch(self) -> None:
        """Tell of the weights."""
        self._tell(Vouched(digest=self.digest))

    def tell(self, message: HostTells) -> None:
        """Tell something else."""
        self._tell(message)

    def sweep(self) -> None:
        """Compute some of what it has."""
        jobs, self.has = self.has[:SWEEP], self.has[SWEEP:]
        if not jobs or self.is_gone:
            return
        self._tell(Entered(numbers=np.array([number for number, _ in jobs])))
        if any(self.deadly in job.prompt for _, job in jobs):
            self.die("a job")
            return
        self.computed += [job.prompt[-1] for _, job in jobs]
        self._tell(Done(completions=PackedCompletions.of([(number, answer(job)) for number, job in jobs])))

    def alive(self) -> None:
        """Say only that it is there."""
        self._tell(Alive())

    def notice(self) -> None:
        """Say that it leaves."""
        self._tell(Leaving(why="the machine is taken back"))

    def fault(self, error: EngineError) -> None:
        """Say that it cannot go on."""
        self._tell(Fault(error=error))

    def die(self, how: str) -> None:
        """End."""
        if not self.is_gone:
            self.is_gone = True
            self._ended(how)


class MadeSupply:
    """Brings hosts when a test says so; others in place of those lost, if it is given a maker."""

    def __init__(self, replace: Callable[[str], MadeHost | None] = lambda name: None) -> None:
        self.hosts: list[MadeHost] = []
        self.losses: list[tuple[str, Loss]] = []
        self.is_closed = False
        self._replace = replace
        self._join: Callable[[Host], None]
        self.fail: Callable[[EngineError], None]

    def begin(self, join: Callable[[Host], None], fail: Callable[[EngineError], None]) -> None:
        self._join, self.fail = join, fail

    def bring(self, *hosts: MadeHost) -> None:
        for host in hosts:
            self.hosts.append(host)
            self._join(host)

    def lost(self, host: Host, loss: Loss) -> bool:
        self.losses.append((host.name, loss))
        other = self._replace(host.name)
        if other is None:
            return False
        self.bring(other)
        return True

    def close(self) -> None:
        self.is_closed = True

    @property
    def living(self) -> list[MadeHost]:
        return [host for host in self.hosts if not host.is_gone]

    def run(self, rng: random.Random, most: int = 10_000) -> None:
        """Let hosts that have something sweep, in any order, until none has."""
        for _ in range(most):
            busy = [host for host in self.living if host.has]
            if not busy:
                return
            rng.choice(busy).sweep()
        raise AssertionError("hosts sweep for ever")


def driver_of(supply: MadeSupply, **how: Any) -> Driver:
    """A driver over made hosts, for which no time passes unless `clock` says so."""
    opening = Opening(model="made", policy=Policy(), jobs=PackedJobs.of([]))
    return Driver(opening, supply, expected=EXPECTED, **{"clock": lambda: 0.0, **how})
