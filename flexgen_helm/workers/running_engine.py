"""What whoever asks an engine needs of it, wherever it computes."""

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
    """What is needed of `engine.Engine`."""

    observer: Callable[[SweepTiming], None] | None

    def sweeps(self, jobs: Sequence[Job]) -> Iterator[list[tuple[int, Completion]]]:
        """Yield lists of (position in jobs, completion), each as soon as its sweep ends."""

    def weights_digest(self) -> str | None:
        """The digest of the weight files once it has read them all; None where it reads none."""

    def compare_with_stock(
        self, jobs: Sequence[Job], completions: Sequence[Completion], progress: Callable[[int, int], None]
    ) -> Findings:
        """Compute `completions` of `jobs` again, together with stock layers of transformers."""

    def close(self) -> None:
        """Give back all memory and files."""


class Cluster(Protocol):
    """Machines that engines are spread over."""

    def load(self, model: str, policy: Policy, window: int | None, jobs: Sequence[Job], share: float) -> HostsEngine:
        """Open a model there, for work of which `jobs` are a `share`; raises `EngineError` where nobody can."""
