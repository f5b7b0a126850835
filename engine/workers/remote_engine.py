"""An engine in worker processes, one for each device, with the interface of an engine in this process."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.asking.front import Front
from engine.asking.pending import Call, Pending
from engine.errors import UnsupportedError
from engine.job import Completion, Job
from engine.member import Member
from engine.planning.planner import Plan
from engine.policy import Policy
from engine.schedule.timing import SweepTiming
from engine.workers.handing_out.sharing_out import Room
from engine.workers.kept_alive import KeptAlive
from engine.workers.messages import Open, Opened
from engine.workers.process import WorkerProcess
from engine.workers.seats import seats_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from engine.verification.layerwise import Findings


class RemoteEngine(Front):
    """Runs jobs like `engine.Engine`, in worker processes that are replaced when they die (see `KeptAlive`).

    Safe to use from several threads; a context manager.
    """

    def __init__(
        self, model: str, policy: Policy, *, window: int | None = None, waiting: Sequence[WorkerProcess] = ()
    ) -> None:
        """Open `model`, a hub id or directory; returns when it is open, and raises what opening it raises.

        window: most positions of a sequence, overriding the model's configuration. waiting: idle processes that have
        opened no model yet; those that are not needed are ended.
        """
        self.policy = policy
        self.observer: Callable[[SweepTiming], None] | None = None
        """Called after each sweep, before its completions are delivered, in a thread of this engine; never
        concurrently.
        """
        self.num_sweeps = 0
        """Sweeps so far, of all devices together."""
        self._observing = threading.Lock()
        seats = seats_for(policy, waiting)
        for note in seats.notes:
            warnings.warn(note, stacklevel=2)
        self._is_several = seats.memory is not None and not seats.stages
        self.gathers = seats.gather
        """Whether each device stores a part of the weights, and all parts are gathered for each layer."""
        openings = [
            Open(
                model=model,
                policy=own,
                window=window,
                member=None
                if seats.memory is None
                else Member(
                    index=index,
                    count=len(seats.policies),
                    gather=seats.gather,
                    stages=seats.stages,
                    memory=seats.memory,
                    weights=None,
                    meeting=None,
                ),
            )
            for index, own in enumerate(seats.policies)
        ]
        self._place = KeptAlive(openings, seats.processes, self._observe)

    @classmethod
    def from_pretrained(
        cls, model: str, policy: Policy | str | Path | Mapping[str, Any] = "auto", *, window: int | None = None
    ) -> RemoteEngine:
        """See `Engine.from_pretrained`."""
        return cls(model, Policy.load(policy), window=window)

    @property
    def opened(self) -> Opened:
        """What the first device's process has reported about its engine."""
        return self._place.opened

    @property
    def parts(self) -> Any:
        """Raises `UnsupportedError`: the parts are in other processes."""
        raise UnsupportedError("an engine in processes of its own has no parts here; name one device")

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the devices in use, as written in the policy."""
        return self._place.devices

    @property
    def plan(self) -> Plan:
        """The plan: where weights, cache and activations are placed, on each device."""
        return self.opened.plan

    @property
    def sweep(self) -> Room:
        """The work that fills a sweep of one device."""
        return Room(rows=self.plan.limits.rows_per_sweep, jobs=self.plan.limits.seats)

    @property
    def window(self) -> int | None:
        """Most positions of a sequence; None if the model sets no limit."""
        return self.opened.window

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.opened.vocab_size

    @property
    def pad_token(self) -> int:
        """The padding token: the model's, else its end-of-text token."""
        return self.opened.pad_token

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        from engine.checkpoint.tokenizer import load_tokenizer  # it imports transformers, which few callers need

        return load_tokenizer(Path(self.opened.path))

    @property
    def deaths(self) -> Sequence[str]:
        """How each process ended that was replaced."""
        return tuple(self._place.deaths)

    @property
    def given_up(self) -> Mapping[str, str]:
        """Devices that are no longer used because their processes kept dying: name -> how the last one ended."""
        return dict(self._place.given_up)

    def sweeps_of_checked(self, jobs: Iterable[Job], entered: Callable[[list[int]], None]) -> Pending:
        """See `Engine.sweeps_of_checked`."""
        pending = Pending(dict(enumerate(jobs)), [], self._abandon, entered)
        self._submit(pending.call)
        return pending

    def weights_digest(self) -> str | None:
        """See `Engine.weights_digest`."""
        return self._place.digest()

    def compare_with_stock(
        self,
        jobs: Sequence[Job],
        completions: Sequence[Completion],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Findings:
        """See `Engine.compare_with_stock`; runs on one device, and raises `EngineError` if its process dies.

        Raises `UnsupportedError` if each device holds only a part of the weights.
        """
        return self._place.compare(jobs, completions, progress)

    def close(self) -> None:
        """End the processes after the current sweep, whose completions are delivered; calls that still wait fail."""
        self._place.close()

    def _submit(self, call: Call) -> None:
        self._place.submit(call)

    def _abandon(self, call: Call) -> None:
        self._place.abandon(call)

    def _observe(self, timing: SweepTiming, device: str) -> None:
        with self._observing:
            self.num_sweeps += 1
            if self.observer is not None:
                self.observer(replace(timing, device=device) if self._is_several else timing)
