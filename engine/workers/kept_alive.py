"""The worker processes of an engine, one for each device: replaces those that die, and keeps the jobs given to them."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from engine.asking.pending import Call
from engine.errors import CapacityError, ConfigError, EngineError, InstallationError, UnsupportedError, named, one_line
from engine.job import Completion, Job
from engine.schedule.timing import SweepTiming
from engine.workers.comparison import Comparison
from engine.workers.crew import Crew
from engine.workers.handing_out.ledger import Ledger
from engine.workers.messages import (
    Ask,
    Compared,
    Digested,
    Done,
    Drop,
    Entered,
    Fault,
    Loaded,
    Note,
    Open,
    Opened,
    Stage,
    Swept,
    Tells,
)
from engine.workers.packing import PackedJobs
from engine.workers.place import Place
from engine.workers.process import WorkerProcess

if TYPE_CHECKING:
    from engine.verification.layerwise import Findings

_log = logging.getLogger(__name__)


class KeptAlive:
    """Runs an engine in worker processes; replaces a process that dies and submits its unanswered jobs again.

    An error that the engine raises on purpose, such as changed weight files, is final. Any other error ends the
    process; a job that ends its process repeatedly is isolated (see `Suspects`) and fails alone. With several devices,
    a device whose processes die repeatedly is given up, and the other devices take over its jobs.
    """

    def __init__(
        self,
        openings: Sequence[Open],
        processes: Sequence[WorkerProcess | None],
        observe: Callable[[SweepTiming, str], None] = lambda timing, device: None,
    ) -> None:
        """Open on each device what `openings` says, in the idle process for that device, if there is one.

        Returns when the model is open on all devices; raises what opening raises. `observe` is called after each sweep
        with the device's name, in a thread of this object, before the completions are delivered.
        """
        self.deaths: list[str] = []  # how each process ended that was replaced
        self.given_up: dict[str, str] = {}  # devices no longer used: name -> how their last process ended
        self._crew = Crew(openings, self._take, self._died, self._end)
        self._observe, self._changed = observe, threading.Condition()
        self._opened: Opened | None = None
        self._is_ready = self._is_closing = False  # ready: the model has been opened on every device
        self._digested: Digested | None = None
        policy = openings[0].policy
        does_share = policy.share_prefix and policy.pad_to_seq_len is None
        self._ledger = Ledger(self._crew.num_asked, share_prefix=does_share, in_step=self._crew.is_bound)
        self._fault: BaseException | None = None
        self._notes: list[str] = []  # warnings that were raised while the model was opened
        self._comparison = Comparison()
        with self._changed:
            self._crew.start(processes)
            try:
                self._wait_for(lambda: self._crew.is_open)
            except BaseException:
                self._is_closing = True
                self._crew.kill()
                raise
            self._is_ready = True
        for note in self._notes:
            warnings.warn(note, stacklevel=4)

    @property
    def opened(self) -> Opened:
        """What the first device's process has reported about its engine."""
        assert self._opened is not None
        return self._opened

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the devices in use."""
        return tuple(place.device for place in self._crew.places)

    def submit(self, call: Call) -> None:
        """Accept a call, whose jobs are in `left`; raises the engine's error if it has failed or is closed."""
        with self._changed:
            self._check_serving()
            self._ledger.add(call, call.left)
            if call.left:  # a call without jobs only asks whether the engine is available
                self._crew.start_the_dead()
            self._feed()

    def abandon(self, call: Call) -> None:
        """Cancel everything unfinished of a call."""
        with self._changed:
            call_number = self._ledger.drop(call)
            if call_number is not None:
                self._crew.tell(Drop(call=call_number))
            self._feed()

    def digest(self) -> str | None:
        """See `Engine.weights_digest`."""
        with self._changed:
            self._wait_for(lambda: self._digested is not None)
            assert self._digested is not None
            if self._digested.error is not None:
                raise self._digested.error.with_traceback(None)
            return self._digested.digest

    def compare(
        self, jobs: Sequence[Job], completions: Sequence[Completion], progress: Callable[[int, int], None]
    ) -> Findings:
        """See `Engine.compare_with_stock`; runs on one device, and raises `EngineError` if its process dies."""
        if self._crew.is_bound:
            raise UnsupportedError(
                "comparing with stock layers needs all weights in one process: set gather-weights: false, without "
                "stages, or name one device"
            )
        with self._comparison.alone:
            with self._changed:
                self._check_serving()
                self._crew.start_the_dead()
                self._wait_for(lambda: self._crew.places[0].opened is not None)
                self._comparison.begin(self._crew.places[0], jobs, completions)
            return self._comparison.outcome(progress)

    def close(self) -> None:
        """End the processes after the current sweep, whose completions are delivered; calls that still wait fail."""
        with self._changed:
            self._is_closing, closing = True, self._crew.part(self._comparison.place)
        for process in closing:
            process.wait()
        self._end(EngineError("the engine was closed while this job was waiting"))

    def _check_serving(self) -> None:
        if self._fault is not None:
            raise self._fault.with_traceback(None)
        if self._is_closing:
            raise EngineError("the engine is closed")

    def _wait_for(self, is_there: Callable[[], bool]) -> None:
        """Wait, with the lock held, until a message of a process makes `is_there` true."""
        while not is_there():
            self._check_serving()
            self._changed.wait()

    def _feed(self) -> None:
        """Send the processes the jobs that they may compute now; the lock is held."""
        able = {place.number: place for place in self._crew.asked if place.may_be_asked}
        if self._fault is None and able:
            for number, asked in self._ledger.to_send({number: place.room for number, place in able.items()}).items():
                for call, jobs in asked.items():
                    able[number].send(Ask(call=call, jobs=PackedJobs.of(jobs)))

    def _take(self, place: Place, process: WorkerProcess, told: Tells) -> None:
        """Handle a message of a process, in the thread that listens to it."""
        if isinstance(told, Swept):
            try:
                self._observe(told.timing, place.device)
            except Exception as error:  # else nobody would read the process's messages
                self._end(EngineError(f"the observer of sweeps failed: {named(error)}"))
                process.kill()
        with self._changed:
            if isinstance(told, Swept):
                place.num_deaths = 0
            elif isinstance(told, Done):
                self._deliver(told.completions.unpack())
            elif isinstance(told, Entered):
                for call, begun in self._ledger.entered(told.numbers.tolist()):
                    call.begin(begun)
                self._feed()
            elif isinstance(told, Opened):
                self._take_opened(place, told)
            elif isinstance(told, Loaded):
                place.num_starts = 0
                place.is_complete = place.is_complete or not place.is_first
                self._feed()
            elif isinstance(told, Digested) and place.is_first:
                self._digested, place.is_complete = told, True
            elif isinstance(told, Stage | Compared):
                self._comparison.tell(told)
            elif isinstance(told, Note):
                self._note(place, told)
            elif isinstance(told, Fault):
                self._take_fault(place, process, told.error)
            self._changed.notify_all()

    def _take_opened(self, place: Place, told: Opened) -> None:
        place.opened = told
        if self._opened is None or place.is_first:
            self._opened = told
        if told.dtype != self._opened.dtype:
            self._end(
                ConfigError(
                    f"devices {', '.join(self.devices)} compute in {self._opened.dtype} and {told.dtype}: set a dtype "
                    "that all of them have"
                )
            )
        self._feed()

    def _take_fault(self, place: Place, process: WorkerProcess, error: BaseException) -> None:
        place.last_words = one_line(error)
        if type(error) is not EngineError:  # raised on purpose: another process would raise the same error
            if self._is_ready and not self._crew.is_alone and isinstance(error, CapacityError | InstallationError):
                place.condemn()  # the device no longer works as it did
            else:
                self._end(error)
        process.kill()

    def _note(self, place: Place, note: Note) -> None:
        if note.logger is None and self._opened is None:
            if note.text not in self._notes:
                self._notes.append(note.text)
        elif place.is_first or note.level >= logging.WARNING:  # what all processes log is logged once
            logging.getLogger(note.logger or __name__).log(note.level, "%s", note.text)

    def _deliver(self, done: Iterable[tuple[int, Completion]]) -> None:
        for call, results in self._ledger.answered(done):
            call.put(results)
        self._feed()

    def _died(self, place: Place, process: WorkerProcess, how: str) -> None:
        """Handle the end of a process, in the thread that listened to it."""
        with self._changed:
            reason, place.last_words = place.last_words or how, ""
            self._comparison.died(place, reason)
            if place.process is process:
                place.process = place.opened = None
                if self._fault is None and place.is_recalled:
                    self._ledger.died([place.number], is_job_at_fault=False)
                    self._crew.take_recalled(place)
                elif self._fault is None:
                    self._replace(place, reason)
            self._changed.notify_all()

    def _replace(self, place: Place, reason: str) -> None:
        """Attribute an unexpected end to a job or the device; continue with a new process or without the device."""
        crew, told = self._crew, f"{place.device}: {reason}" if self._crew.is_several else reason
        ended = [place, *(other for other in crew.asked if crew.is_bound and other is not place)]
        place.num_deaths += not place.num_starts and not self._ledger.is_on_trial(place.number)
        failed = self._ledger.died(
            {each.number: each for each in ended},
            is_job_at_fault=not any(each.num_starts for each in ended),  # otherwise weights were still being read
        )
        is_hopeless = place.is_hopeless(is_alone=crew.is_alone)
        if is_hopeless and crew.is_alone:
            times = f"{place.num_starts} times in a row before all weights were in place"
            self._end(EngineError(f"the engine's process ended {times}: {told}"))
            return
        if is_hopeless:
            _log.warning("device %s is given up: its process ends each time (%s); others go on", place.device, reason)
            self.given_up[place.device] = reason
            self._ledger.give_up(place.number)
        else:
            restarted = "it is started again, and what it had not answered is asked again"
            _log.warning("the engine's process ended (%s); %s", told, restarted)
            self.deaths.append(told)
        error = EngineError(
            f"computing this request ended the engine's process each time, at last alone ({reason}); the others are "
            "answered without it"
        )
        self._deliver((number, Completion(error=error)) for number in failed)
        self._go_on(place, is_given_up=is_hopeless)

    def _go_on(self, place: Place, *, is_given_up: bool) -> None:
        """Start the processes that have to be started after the process of `place` has ended."""
        crew = self._crew
        is_needed = crew.is_bound or not place.is_complete  # other processes wait for its part of the weights
        if is_given_up:
            crew.give_up(place)
        if crew.is_waiting:
            return  # all are started when the last recalled process has ended
        if crew.is_bound or (is_given_up and is_needed):
            crew.recall(place)
        elif not is_given_up and (not self._ledger.is_empty or not self._is_ready or is_needed):
            crew.start_at(place)

    def _end(self, fault: BaseException) -> None:
        """Fail all calls that are waiting; the engine accepts no more."""
        with self._changed:
            self._fault = self._fault or fault
            calls = self._ledger.clear()
            self._changed.notify_all()
        for call in calls:
            call.put(fault)
