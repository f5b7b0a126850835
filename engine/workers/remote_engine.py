"""An engine in a process of its own, asked as one in this process is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from engine.errors import JobError
from engine.job import Completion, Job
from engine.pending import Finished, Pending
from engine.planning.planner import Plan
from engine.policy import Policy
from engine.schedule.timing import SweepTiming
from engine.workers.kept_alive import KeptAlive
from engine.workers.messages import Open, Opened
from engine.workers.process import WorkerProcess

if TYPE_CHECKING:
    from engine.verification.layerwise import Findings


class RemoteEngine:
    """Runs jobs as `engine.Engine` does, in a process that is replaced when it dies (see `KeptAlive`).

    Safe to use from several threads; a context manager.
    """

    def __init__(
        self, model: str, policy: Policy, *, window: int | None = None, process: WorkerProcess | None = None
    ) -> None:
        """Open `model`, a hub id or directory; returns when it is open, and raises what opening it raises.

        window: most positions of a sequence, in place of what the model's files tell. process: one that waits for its
        first message.
        """
        self.policy = policy
        self.observer: Callable[[SweepTiming], None] | None = None
        """Called after each sweep, before its completions are delivered, in a thread of this engine."""
        self.num_sweeps = 0
        """Passes over the weights so far."""
        self._place = KeptAlive(Open(model=model, policy=policy, window=window), process, self._observe)

    @classmethod
    def from_pretrained(
        cls, model: str, policy: Policy | str | Path = "auto", *, window: int | None = None
    ) -> RemoteEngine:
        """As `Engine.from_pretrained`."""
        return cls(model, Policy.load(policy), window=window)

    @property
    def opened(self) -> Opened:
        """What the process has told of its engine."""
        return self._place.opened

    @property
    def plan(self) -> Plan:
        """Where everything lies."""
        return self.opened.plan

    @property
    def window(self) -> int | None:
        """Most positions of a sequence; None when the model sets no limit."""
        return self.opened.window

    @property
    def deaths(self) -> Sequence[str]:
        """How processes have ended that were replaced."""
        return tuple(self._place.deaths)

    def run(self, jobs: Iterable[Job]) -> list[Completion]:
        """As `Engine.run`."""
        jobs = list(jobs)
        found = dict(self.stream(jobs))
        return [found[index] for index in range(len(jobs))]

    def stream(self, jobs: Iterable[Job]) -> Iterator[tuple[int, Completion]]:
        """As `Engine.stream`."""
        return _each(self.sweeps(jobs))

    def sweeps(self, jobs: Iterable[Job]) -> Pending:
        """As `Engine.sweeps`."""
        good: dict[int, Job] = {}
        bad: Finished = []
        for index, job in enumerate(jobs):
            try:
                job.check()
                job.check_fits(self.opened.vocab_size, self.window, self.policy.pad_to_seq_len)
                good[index] = job
            except JobError as error:
                bad.append((index, Completion(error=error)))
        pending = Pending(dict.fromkeys(good), bad, self._place.abandon)
        self._place.submit(pending.call, good)
        return pending

    def weights_digest(self) -> str | None:
        """As `Engine.weights_digest`."""
        return self._place.digest()

    def compare_with_stock(
        self,
        jobs: Sequence[Job],
        completions: Sequence[Completion],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Findings:
        """As `Engine.compare_with_stock`; raises `EngineError` when the process dies meanwhile."""
        return self._place.compare(jobs, completions, progress)

    def close(self) -> None:
        """End the process after the sweep at hand, whose completions are delivered; waiting calls fail."""
        self._place.close()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _observe(self, timing: SweepTiming) -> None:
        self.num_sweeps += 1
        if self.observer is not None:
            self.observer(timing)


def _each(sweeps: Pending) -> Iterator[tuple[int, Completion]]:
    with closing(sweeps):
        for finished in sweeps:
            yield from finished
