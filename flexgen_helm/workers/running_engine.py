"""The interface that commands need of an engine, in whichever process or machine it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from engine.job import Completion, Job
from engine.policy import Policy
from engine.schedule.timing import SweepTiming

if TYPE_CHECKING:
    from engine.hosts.hosts_engine import HostsEngine
    from engine.verification.layerwise import Findings


class RunningEngine(Protocol):
    """The part of the interface of `engine.Engine` that commands use."""

    observer: Callable[[SweepTiming], None] | None

    def sweeps(self, jobs: Sequence[Job]) -> Iterator[list[tuple[int, Completion]]]:
        """Yield lists of (position in jobs, completion), each as soon as its sweep ends."""

    def weights_digest(self) -> str | None:
        """The digest of the weight files, once all are read; None if there are none."""

    def compare_with_stock(
        self, jobs: Sequence[Job], completions: Sequence[Completion], progress: Callable[[int, int], None]
    ) -> Findings:
        """Compute `completions` of `jobs` again and compare them with stock layers of transformers."""

    def close(self) -> None:
        """Release all memory and files."""


class Cluster(Protocol):
    """Machines that can run a model together."""

    def load(self, model: str, policy: Policy, window: int | None, jobs: Sequence[Job], share: float) -> HostsEngine:
        """Open a model on them, for work of which `jobs` are a `share`; raises `EngineError` if none can open it."""
