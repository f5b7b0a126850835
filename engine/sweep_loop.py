"""The engine's thread: accepts jobs, runs one sweep after the other, and delivers the completions."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from engine.advance import advance
from engine.asking.pending import Call, Finished
from engine.errors import EngineError, NumericsError
from engine.executor import Answer
from engine.job import Completion
from engine.memory import accelerator
from engine.opening import Parts, explained
from engine.schedule.segment import Segment
from engine.schedule.sequence import Sequence
from engine.schedule.timing import SweepTiming, count_rows
from engine.text.completion import completion_of
from engine.weights.members.lockstep import Lockstep


class SweepLoop:
    """Serves calls of any thread together: jobs that arrive while a sweep runs join the next one."""

    def __init__(self, parts: Parts, observe: Callable[[SweepTiming], None]) -> None:
        """`observe` is called in the engine's thread after each sweep, before its completions are delivered."""
        self._parts = parts
        self._observe = observe
        self._owner: dict[int, tuple[Call, int]] = {}
        """The call of each sequence in progress and its position there, by the sequence's identity."""
        self._to_enter: set[int] = set()
        """The sequences whose caller wants to know when they are first computed, and which have not been yet."""
        self._inbox: list[tuple[Call, dict[int, Sequence]]] = []
        self._abandoned: list[Call] = []
        self._changed = threading.Condition()
        self._closing = False
        self._is_waiting = False
        """Whether the engine's thread waits for work."""
        self._is_lent = False
        """Whether another thread is using the parts."""
        self._loaded = math.inf
        """When all weights were loaded, by `time.perf_counter`."""
        self._fault: BaseException | None = None
        executor = parts.executor
        self._lockstep: Lockstep[list[Segment], Answer] = Lockstep(
            lambda batches: executor.sweep(batches), executor.recover, parts.group
        )
        self._thread = threading.Thread(target=self._serve, name="flexgen-engine", daemon=True)
        self._loader = threading.Thread(target=self._load, name="flexgen-load", daemon=True)
        self._loader.start()
        self._thread.start()

    def submit(self, call: Call) -> None:
        """Accept a call; raises the fault that ended the engine, or `EngineError` when it is closed."""
        with self._changed:
            self._check_serving()
            if call.left:
                self._inbox.append((call, dict(call.left)))
                self._changed.notify_all()

    def abandon(self, call: Call) -> None:
        """Drop the unfinished jobs of `call`."""
        if not call.left:
            return
        with self._changed:
            if self._fault is None and not self._closing:  # else nobody looks at it any more
                self._abandoned.append(call)
                self._changed.notify_all()

    @contextmanager
    def lend(self) -> Iterator[Parts]:
        """Inside, the caller's thread uses the parts; jobs and `close` wait until it is done.

        It waits until the jobs in progress have ended. Raises the fault that ended the engine, or `EngineError` when it
        is closed.
        """
        with self._changed:
            while not (self._is_waiting and not self._is_lent):
                self._check_serving()
                self._changed.wait()
            self._check_serving()
            self._is_lent = True
        try:
            accelerator.make_current(self._parts.arena.device)
            yield self._parts
        finally:
            with self._changed:
                self._is_lent = False
                self._changed.notify_all()

    def _check_serving(self) -> None:
        if self._fault is not None:
            raise self._fault.with_traceback(None)  # else it would grow, and keep frames, with every call
        if self._closing:
            raise EngineError("the engine is closed")

    @property
    def num_jobs(self) -> int:
        """The number of jobs in progress."""
        return len(self._owner)

    def close(self) -> bool:
        """Stop serving; waiting calls fail. Returns when the threads have ended; False if it was closed before."""
        if threading.current_thread() is self._thread:
            raise EngineError(
                "the observer closes the engine, which waits for the observer; close it in another thread"
            )
        with self._changed:
            if self._closing:
                return False
            self._closing = True
            self._changed.notify_all()
        self._parts.weights.give_up(EngineError("the engine was closed before all weights were in place"))
        self._loader.join()
        self._thread.join()
        return True

    def _load(self) -> None:
        loading = self._parts.loading
        try:
            accelerator.make_current(self._parts.arena.device)
            for _ in loading:
                if self._closing:
                    return
            self._loaded = min(self._loaded, time.perf_counter())
        except BaseException as error:
            weights, fault = self._parts.weights, explained(error, self._parts.policy)
            weights.give_up(fault)
            if self._parts.draft is not None:
                self._parts.draft.weights.give_up(fault)
            if weights.digest is not None:  # `loading`, which ends it otherwise, may not have begun
                weights.digest.give_up(fault)
        finally:
            if isinstance(loading, Generator):  # it may be writing down encoded weights, out of memory that goes soon
                loading.close()

    def _serve(self) -> None:
        try:
            accelerator.make_current(self._parts.arena.device)
            while self._receive():
                self._step()
        except BaseException as error:
            self._fault = explained(error, self._parts.policy)
        finally:
            self._lockstep.leave()
            with self._changed:
                self._changed.notify_all()  # who waits to borrow the parts
                calls = {id(call): call for call, _ in [*self._owner.values(), *self._inbox]}
                self._inbox.clear()
            for call in calls.values():
                call.put(self._fault or EngineError("the engine was closed while this job was waiting"))

    def _receive(self) -> bool:
        """Accept what arrived; wait when there is nothing to do. False when the engine closes."""
        scheduler = self._parts.scheduler
        with self._changed:
            while self._is_lent or (scheduler.is_idle and not self._inbox and not self._closing):
                self._is_waiting = True
                self._changed.notify_all()
                if not self._changed.wait(self._lockstep.idle_s):
                    break  # the other members of a group may have work
            self._is_waiting = False
            if self._closing:
                return False
            inbox, self._inbox = self._inbox, []
            abandoned, self._abandoned = self._abandoned, []
        for call, sequences in inbox:  # all of them before anything can fail: a fault is told to the owners
            self._owner.update({id(sequence): (call, index) for index, sequence in sequences.items()})
            if call.entered is not None:
                self._to_enter.update(map(id, sequences.values()))
        for _, sequences in inbox:
            scheduler.add(sequences.values())
        for call in abandoned:
            left = [sequence for sequence in call.left.values() if id(sequence) in self._owner]
            for sequence in left:
                del self._owner[id(sequence)]
                self._to_enter.discard(id(sequence))
            if left:
                scheduler.drop(left)
        return True

    def _step(self) -> None:
        """Run one sweep: schedule, compute, advance, deliver."""
        scheduler, text = self._parts.scheduler, self._parts.text
        begun = time.perf_counter()
        batches = scheduler.next_sweep()
        self._deliver([(sequence, completion_of(sequence, text)) for sequence in scheduler.take_failed()])
        if not batches:
            self._lockstep.sweep([])
            return
        self._tell_entered()
        num_sequences = len(scheduler.running)
        scheduled = time.perf_counter()
        if self._loaded > scheduled and self._parts.weights.is_complete:  # the loader has yet to say so
            self._loaded = scheduled
        batches, answers = self._sweep(batches)
        self._parts.weights.check_source()  # answers of weights that changed meanwhile are delivered to nobody
        swept = time.perf_counter()
        before = _num_generated(scheduler.running)
        advance(batches, answers, text)
        new_tokens = _num_generated(scheduler.running) - before
        done, suspects = [], []
        for sequence in scheduler.running:
            if not sequence.is_finite_with_prefixes and not sequence.is_alone:
                suspects.append(sequence)
                continue
            if not sequence.is_finite_with_prefixes:
                sequence.error = self._not_finite()
            if sequence.is_done:
                done.append((sequence, completion_of(sequence, text)))
        done += [(sequence, completion_of(sequence, text)) for sequence in scheduler.take_failed()]
        scheduler.finish(sequence for sequence, _ in done)
        scheduler.isolate(suspects)
        prefill_rows, decode_rows = count_rows(batches)
        load_s = max(0.0, min(swept, self._loaded) - scheduled)
        if self._parts.draft is not None and not load_s:
            self._parts.draft.drafts.swept(prefill_rows + decode_rows, swept - scheduled)
        self._observe(
            SweepTiming(
                begun=begun,
                host_s=scheduled - begun + time.perf_counter() - swept,
                load_s=load_s,
                sweep_s=swept - scheduled,
                link_s=min(self._parts.stream.link_wait.take(), swept - scheduled - load_s),
                prefill_rows=prefill_rows,
                decode_rows=decode_rows,
                num_sequences=num_sequences,
                new_tokens=new_tokens,
                device=str(self._parts.arena.device),
            )
        )
        self._deliver(done)  # last: whoever sees the result finds the room free

    def _tell_entered(self) -> None:
        """Tell callers which of their jobs are about to be computed for the first time."""
        if not self._to_enter:
            return
        new: dict[int, tuple[Call, list[int]]] = {}
        for sequence in self._parts.scheduler.running:
            if id(sequence) in self._to_enter:
                self._to_enter.discard(id(sequence))
                call, index = self._owner[id(sequence)]
                new.setdefault(id(call), (call, []))[1].append(index)
        for call, indices in new.values():
            assert call.entered is not None
            call.entered(indices)

    def _sweep(self, batches: list[list[Segment]]) -> tuple[list[list[Segment]], list[Answer]]:
        """The results of a sweep, and its answers.

        A sweep changes no span, so one that runs out of device memory is computed again, in smaller parts.
        """
        executor, scheduler, device = self._parts.executor, self._parts.scheduler, self._parts.arena.device
        while batches:
            try:
                answers = self._lockstep.sweep(batches)
                if scheduler.limits.replays and executor.steps.refusal is not None:
                    scheduler.limits = replace(scheduler.limits, replays=False)
                return batches, answers
            except Exception as error:
                if not accelerator.is_out_of_memory(error):
                    raise
                reason = str(explained(error, self._parts.policy))
            self._lockstep.recover()
            accelerator.release_memory(device)
            batches = scheduler.cut_smaller(batches, reason)
            executor.limits = scheduler.limits
        return [], []

    def _not_finite(self) -> NumericsError:
        return NumericsError(
            f"the model's logits for this prompt are not finite in {self._parts.model.dtype}; "
            "take a dtype with a wider range (bfloat16, float32), or check the weights"
        )

    def _deliver(self, done: Iterable[tuple[Sequence, Completion]]) -> None:
        finished: dict[int, tuple[Call, Finished]] = {}
        for sequence, completion in done:
            call, index = self._owner.pop(id(sequence))
            self._to_enter.discard(id(sequence))
            call.left.pop(index)
            finished.setdefault(id(call), (call, []))[1].append((index, completion))
        for call, results in finished.values():
            call.put(results)


def _num_generated(sequences: Iterable[Sequence]) -> int:
    return sum(len(sequence.generated_logprobs) for sequence in sequences)
