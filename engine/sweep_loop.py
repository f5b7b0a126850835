"""The engine's thread: accepts jobs, runs one sweep after the other, and delivers the completions."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from engine.advance import advance
from engine.asking.in_work import InWork
from engine.asking.pending import Call
from engine.errors import EngineError, NumericsError
from engine.executor import Answer
from engine.job import Completion
from engine.memory import accelerator
from engine.opening import Parts, explained
from engine.schedule.segment import Segment
from engine.schedule.sequence import Sequence
from engine.schedule.timing import SweepTiming, count_rows
from engine.stages.track import Scheduled, Track
from engine.text.completion import completion_of
from engine.weights.members.loader import Loader
from engine.workers.handing_out.lanes import LaneShares
from engine.workers.handing_out.sharing_out import Room

_SWEEPS_AHEAD = 2
"""Sweeps for which a lane is given sequences in advance, as devices are given jobs."""


class SweepLoop:
    """Serves calls of any thread together: jobs that arrive while a sweep runs join the next one.

    If the model is in stages, there are as many lanes as stages: each has a sweep in progress at the same time, one at
    every stage. This stage has the last layers, and sends the others the schedule of each sweep.
    """

    def __init__(self, parts: Parts, loader: Loader, observe: Callable[[SweepTiming], None]) -> None:
        """`observe` is called in the engine's thread after each sweep, before its completions are delivered."""
        self._parts, self._loader = parts, loader
        self._observe = observe
        self._in_work = InWork()
        self._inbox: list[tuple[Call, dict[int, Sequence]]] = []
        self._abandoned: list[Call] = []
        self._changed = threading.Condition()
        self._closing = False
        self._is_waiting = False
        """Whether the engine's thread waits for work."""
        self._is_lent = False
        """Whether another thread is using the parts."""
        self._fault: BaseException | None = None
        self._tracks = [Track(number, lane.scheduler) for number, lane in enumerate(parts.lanes)]
        self._locksteps = [lane.in_step_with(parts.group) for lane in parts.lanes]
        limits = parts.plan.limits
        room = Room(rows=_SWEEPS_AHEAD * limits.rows_per_sweep, jobs=_SWEEPS_AHEAD * limits.seats)
        self._shares = LaneShares([room] * len(self._tracks), share_prefix=parts.policy.share_prefix)
        self._thread = threading.Thread(target=self._serve, name="flexgen-engine", daemon=True)
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
            if self._fault is None and not self._closing:  # otherwise no thread reads the list any more
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
        return len(self._in_work)

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
        self._loader.close()
        self._thread.join()
        return True

    def _serve(self) -> None:
        try:
            accelerator.make_current(self._parts.arena.device)
            is_open = True
            for track in itertools.cycle(self._tracks):  # other stages compute lanes' sweeps in this order
                self._end(track)
                is_open = is_open and self._receive()
                if is_open and track.sweep is None:
                    self._begin(track)
                elif not any(each.sweep for each in self._tracks):
                    break
        except BaseException as error:
            self._fault = explained(error, self._parts.policy)
        finally:
            self._leave()
            with self._changed:
                self._changed.notify_all()  # who waits to borrow the parts
                calls = {id(call): call for call in [*self._in_work.calls(), *(call for call, _ in self._inbox)]}
                self._inbox.clear()
            for call in calls.values():
                call.put(self._fault or EngineError("the engine was closed while this job was waiting"))

    def _leave(self) -> None:
        """Tell the engines that compute with this one that it ends."""
        self._locksteps[0].leave()
        if self._parts.line is not None:
            with suppress(EngineError):
                self._parts.line.end()

    def _receive(self) -> bool:
        """Accept what arrived; wait when there is nothing to do. False when the engine closes."""
        is_busy = not all(track.is_idle for track in self._tracks)
        with self._changed:
            while self._is_lent or not (self._inbox or self._closing or is_busy):
                self._is_waiting = True
                self._changed.notify_all()
                if not self._changed.wait(self._locksteps[0].idle_s):
                    break  # the other members of a group may have work
            self._is_waiting = False
            if self._closing:
                return False
            inbox, self._inbox = self._inbox, []
            abandoned, self._abandoned = self._abandoned, []
        for call, sequences in inbox:  # all of them before anything can fail: an error goes to the calls in progress
            self._in_work.add(call, sequences)
        for new in (*(list(sequences.values()) for _, sequences in inbox), []):
            for number, given in self._shares.share_out(new).items():
                self._tracks[number].add(given)
        for call in abandoned:
            for sequence in call.left.values():
                lane = self._shares.lane_of(sequence)
                if lane is not None:
                    self._tracks[lane].drop(sequence)
                else:
                    self._leave_out(sequence)
        return True

    def _leave_out(self, sequence: Sequence) -> bool:
        """Remove a sequence from the ones in progress; returns False if it was not among them."""
        if sequence not in self._in_work:
            return False
        self._in_work.forget(sequence)
        self._shares.left(sequence)
        return True

    def _begin(self, track: Track) -> None:
        """Schedule a lane's next sweep, and send it to the other stages."""
        scheduler, text = track.scheduler, self._parts.text
        begun = time.perf_counter()
        track.take_over(self._leave_out)
        batches = scheduler.next_sweep()
        self._deliver([(sequence, completion_of(sequence, text)) for sequence in scheduler.take_failed()])
        if not batches:
            self._locksteps[track.number].sweep([])
            return
        self._shares.entered(scheduler.running)
        self._in_work.tell_entered(scheduler.running)
        self._parts.lanes[track.number].tell(batches)
        count, host_s = len(scheduler.running), time.perf_counter() - begun
        track.sweep = Scheduled(batches=batches, begun=begun, host_s=host_s, num_sequences=count)

    def _end(self, track: Track) -> None:
        """Compute a lane's sweep, if one was scheduled, advance, deliver."""
        if track.sweep is None:
            return
        sweep, track.sweep = track.sweep, None
        scheduler, text = track.scheduler, self._parts.text
        computing = time.perf_counter()
        if self._loader.loaded > computing and self._parts.weights.is_complete:  # the loader has yet to say so
            self._loader.loaded = computing
        batches, answers = self._sweep(track, sweep)
        if track.sweep is not None:
            return  # it is computed again
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
        load_s = max(0.0, min(swept, self._loader.loaded) - computing)
        if self._parts.draft is not None and not load_s:
            self._parts.draft.drafts.swept(prefill_rows + decode_rows, swept - computing)
        self._observe(
            SweepTiming(
                begun=sweep.begun,
                host_s=sweep.host_s + time.perf_counter() - swept,
                load_s=load_s,
                sweep_s=swept - computing,
                link_s=min(self._parts.stream.link_wait.take(), swept - computing - load_s),
                prefill_rows=prefill_rows,
                decode_rows=decode_rows,
                num_sequences=sweep.num_sequences,
                new_tokens=new_tokens,
                device=str(self._parts.arena.device),
            )
        )
        self._deliver(done)  # last, so that a caller who sees the result finds the space free

    def _sweep(self, track: Track, sweep: Scheduled) -> tuple[list[list[Segment]], list[Answer]]:
        """The micro-batches of a sweep, and its answers.

        A sweep changes no span, so one that runs out of memory is computed again, in smaller parts: at once, or, where
        other stages compute it, too, after those of other lanes that they have been told of.
        """
        lane, lockstep = self._parts.lanes[track.number], self._locksteps[track.number]
        scheduler, batches = track.scheduler, sweep.batches
        while batches:
            try:
                answers = lockstep.sweep(batches)
                if scheduler.limits.replays and lane.executor.steps.refusal is not None:
                    scheduler.limits = replace(scheduler.limits, replays=False)
                return batches, answers
            except Exception as error:
                if not lane.has_lost(error):
                    raise
                reason = str(explained(error, self._parts.policy))
            lockstep.recover()
            accelerator.release_memory(self._parts.arena.device)
            batches = scheduler.cut_smaller(batches, reason)
            lane.executor.limits = scheduler.limits
            if batches and self._parts.line is not None:
                lane.tell(batches)
                track.sweep = replace(sweep, batches=batches)
                break
        return [], []

    def _not_finite(self) -> NumericsError:
        return NumericsError(
            f"the model's logits for this prompt are not finite in {self._parts.model.dtype}; "
            "take a dtype with a wider range (bfloat16, float32), or check the weights"
        )

    def _deliver(self, done: Iterable[tuple[Sequence, Completion]]) -> None:
        done = list(done)
        for sequence, _ in done:
            self._shares.left(sequence)
        self._in_work.deliver(done)


def _num_generated(sequences: Iterable[Sequence]) -> int:
    return sum(len(sequence.generated_logprobs) for sequence in sequences)
