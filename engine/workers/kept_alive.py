"""An engine's process that is replaced when it dies, and the jobs that it was given."""

from __future__ import annotations

import logging
import queue
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from engine.errors import EngineError, named, one_line
from engine.job import Completion, Job
from engine.pending import Call
from engine.schedule.timing import SweepTiming
from engine.workers.ledger import Ledger
from engine.workers.messages import (
    Ask,
    Compare,
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
from engine.workers.process import WorkerProcess

if TYPE_CHECKING:
    from engine.verification.layerwise import Findings

_MOST_STARTS = 3
"""Processes in a row that may die before all weights are in place."""
_log = logging.getLogger(__name__)


class KeptAlive:
    """Runs an engine in a process; one that dies is started again, and what it had not answered is asked again.

    A fault that the engine raises on purpose, such as weights that have changed, is final. Anything else ends the
    process; a job that does so again and again is found (see `Suspects`) and fails alone.
    """

    def __init__(
        self, opening: Open, process: WorkerProcess | None, observe: Callable[[SweepTiming], None] = lambda timing: None
    ) -> None:
        """Open what `opening` says, in `process` if one waits for that; returns when it is open.

        `observe` is called after each sweep, in a thread of this object, before completions are delivered. Raises what
        opening raises.
        """
        self.deaths: list[str] = []
        """How processes have ended that were replaced."""
        self._opening = opening
        self._observe = observe
        self._changed = threading.Condition()
        self._process: WorkerProcess | None = None
        self._opened: Opened | None = None
        self._is_open = False
        """Whether the process of now has opened the model."""
        self._digested: Digested | None = None
        self._num_starts = 0
        """Since weights were last in place."""
        self._ledger = Ledger()
        self._fault: BaseException | None = None
        self._last_words = ""
        """What the process said of its end."""
        self._is_closing = False
        self._notes: list[str] = []
        """Warnings while the model was being opened."""
        self._comparing = threading.Lock()
        self._stages: queue.SimpleQueue[Stage | Compared | BaseException] | None = None
        with self._changed:
            self._start(process)
            try:
                self._wait_for(lambda: self._is_open)
            except BaseException:
                self._is_closing = True
                process, self._process = self._process, None
                if process is not None:
                    process.kill()
                raise
        for note in self._notes:
            warnings.warn(note, stacklevel=4)

    @property
    def opened(self) -> Opened:
        """What the process has told of its engine."""
        assert self._opened is not None, "it is open as soon as it is made"
        return self._opened

    def submit(self, call: Call, jobs: Mapping[int, Job]) -> None:
        """Take in a call's jobs; raises the fault that ended the engine, or `EngineError` when it is closed."""
        with self._changed:
            self._check_serving()
            self._ledger.add(call, jobs)
            self._start_if_dead()
            self._feed()

    def abandon(self, call: Call) -> None:
        """Drop what of a call has not ended."""
        with self._changed:
            call_number = self._ledger.drop(call)
            if call_number is not None and self._process is not None:
                self._process.send(Drop(call=call_number))
            self._feed()

    def digest(self) -> str | None:
        """As `Engine.weights_digest`."""
        with self._changed:
            self._wait_for(lambda: self._digested is not None)
            assert self._digested is not None
            if self._digested.error is not None:
                raise self._digested.error.with_traceback(None)
            return self._digested.digest

    def compare(
        self, jobs: Sequence[Job], completions: Sequence[Completion], progress: Callable[[int, int], None]
    ) -> Findings:
        """As `Engine.compare_with_stock`; raises `EngineError` when the process dies meanwhile."""
        stages: queue.SimpleQueue[Stage | Compared | BaseException] = queue.SimpleQueue()
        with self._comparing:
            with self._changed:
                self._check_serving()
                self._start_if_dead()
                self._wait_for(lambda: self._is_open)
                assert self._process is not None
                self._stages = stages
                self._process.send(Compare(jobs=tuple(jobs), completions=tuple(completions)))
            while isinstance(told := stages.get(), Stage):  # if interrupted, `close` finds that it goes on
                progress(told.done, told.total)
            with self._changed:
                self._stages = None
        outcome = told.outcome if isinstance(told, Compared) else told
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def close(self) -> None:
        """End the process after the sweep at hand, whose completions are delivered; waiting calls fail."""
        with self._changed:
            self._is_closing = True
            process, self._process = self._process, None
            if process is not None and (self._stages is not None or not self._is_open):
                process.kill()  # nothing of what it does is kept
        if process is not None:
            process.close()
        self._end(EngineError("the engine was closed while this job was waiting"))

    def _check_serving(self) -> None:
        if self._fault is not None:
            raise self._fault.with_traceback(None)
        if self._is_closing:
            raise EngineError("the engine is closed")

    def _wait_for(self, is_there: Callable[[], bool]) -> None:
        """Wait, with the lock held, for what the process is to tell."""
        while not is_there():
            self._check_serving()
            self._changed.wait()

    def _start(self, process: WorkerProcess | None = None) -> None:
        self._num_starts += 1
        self._is_open = False
        process = self._process = process or WorkerProcess()
        process.listen(lambda told: self._take(process, told), lambda how: self._died(process, how))
        process.send(self._opening)

    def _start_if_dead(self) -> None:
        if self._process is None:
            self._start()

    def _feed(self) -> None:
        """Give the process what it may compute now; the lock is held."""
        if self._is_open and self._process is not None:
            for call, jobs in self._ledger.to_send().items():
                self._process.send(Ask(call=call, jobs=PackedJobs.of(jobs)))

    def _take(self, process: WorkerProcess, told: Tells) -> None:
        """Act on what the process says, in the thread that listens to it."""
        if isinstance(told, Swept):
            try:
                self._observe(told.timing)
            except Exception as error:  # nobody would hear the process any more
                self._end(EngineError(f"the observer of sweeps failed: {named(error)}"))
                process.kill()
            return
        with self._changed:
            if isinstance(told, Done):
                self._deliver(told.completions.unpack())
            elif isinstance(told, Entered):
                self._ledger.entered(told.numbers.tolist())
            elif isinstance(told, Opened):
                self._opened, self._is_open = told, True
                self._feed()
            elif isinstance(told, Loaded):
                self._num_starts = 0
            elif isinstance(told, Digested):
                self._digested = told
            elif isinstance(told, Stage | Compared):
                if self._stages is not None:
                    self._stages.put(told)
            elif isinstance(told, Note):
                self._note(told)
            elif isinstance(told, Fault):
                self._last_words = one_line(told.error)
                if type(told.error) is not EngineError:
                    self._end(told.error)  # it was raised on purpose: another process would say the same
                process.kill()
            self._changed.notify_all()

    def _note(self, note: Note) -> None:
        if note.logger is None and self._opened is None:
            self._notes.append(note.text)
        else:
            logging.getLogger(note.logger or __name__).log(note.level, "%s", note.text)

    def _deliver(self, done: Iterable[tuple[int, Completion]]) -> None:
        for call, results in self._ledger.answered(done):
            call.put(results)
        self._feed()

    def _died(self, process: WorkerProcess, how: str) -> None:
        """Start another process in place of one that has ended, in the thread that listened to it."""
        with self._changed:
            reason, self._last_words = self._last_words or how, ""
            if self._stages is not None:
                self._stages.put(EngineError(f"the engine's process ended while it compared layers: {reason}"))
            if self._process is process:
                self._process = None
                if self._num_starts >= _MOST_STARTS:
                    self._end(
                        EngineError(
                            f"the engine's process ended {self._num_starts} times in a row before all weights were in "
                            f"place: {reason}"
                        )
                    )
                elif self._fault is None:
                    self._replace(reason)
            self._changed.notify_all()

    def _replace(self, reason: str) -> None:
        _log.warning(
            "the engine's process ended (%s); it is started again, and what it had not answered is asked again", reason
        )
        self.deaths.append(reason)
        failed = self._ledger.died(is_job_at_fault=not self._num_starts)  # else weights were still being read
        error = EngineError(
            f"computing this request ended the engine's process each time, at last alone ({reason}); the others are "
            "answered without it"
        )
        self._deliver((number, Completion(error=error)) for number in failed)
        if not self._ledger.is_empty or self._opened is None or self._digested is None:
            self._start()

    def _end(self, fault: BaseException) -> None:
        """Tell everybody who waits that there is nothing more to come."""
        with self._changed:
            self._fault = self._fault or fault
            calls = self._ledger.clear()
            self._changed.notify_all()
        for call in calls:
            call.put(fault)
