"""Chooses the work of the next sweep, and cuts it into micro-batches (pure)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import chain, islice

from engine.errors import CapacityError
from engine.planning.limits import Limits
from engine.schedule.cache_room import CacheRoom
from engine.schedule.cutting import packed_batches, rectangular_batches, rows_of
from engine.schedule.intake import Intake, most_admitted, most_hidden
from engine.schedule.passing import continued_prefixes, idle_prefixes, spare_blocks
from engine.schedule.pieces import beginning, is_too_long, largest, named, no_room, place, smaller, split, whole
from engine.schedule.prefix import share_prefixes
from engine.schedule.segment import AddDrafts, Segment, add_drafts
from engine.schedule.sequence import Prefix, Sequence, Span
from engine.schedule.turns import Turns
from engine.schedule.waiting import Waiting


class Scheduler:
    """Keeps waiting and running sequences; between sweeps finished ones leave and waiting ones enter."""

    def __init__(
        self, limits: Limits, cache: CacheRoom, *, share_prefix: bool = True, drafts: AddDrafts = add_drafts
    ) -> None:
        self.limits = self._planned = limits
        self.running: list[Sequence] = []
        self._cache = cache
        self._share_prefix = share_prefix and limits.continues and not isinstance(limits.pad, int)
        self._waiting = Waiting()
        self._prefixes: list[Prefix] = []
        self.failed: list[Sequence] = []
        self._turns = Turns(drafts)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self._waiting

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue new sequences; adjacent ones share prefixes where they can."""
        sequences = list(sequences)
        ordered = share_prefixes(sequences, self._prefixes) if self._share_prefix else sequences
        known = set(map(id, self._prefixes))
        decoding = islice((sequence for sequence in ordered if sequence.needs_cache), self.limits.seats)
        expected = [sequence.capacity for sequence in decoding]
        for sequence in ordered:
            for prefix in sequence.chain:
                prefix.scored |= sequence.job.prompt_logprobs and not prefix.is_computed
                if id(prefix) not in known:
                    known.add(id(prefix))
                    self._prefixes.append(prefix)
                    expected.append(len(prefix.tokens))
            if sequence.job.prompt_logprobs and not all(prefix.scored for prefix in sequence.chain):
                self._unshare(sequence)  # a prefix computed without log-probabilities cannot supply them
        self._cache.expect(expected)
        self._waiting.add(ordered)

    def next_sweep(self) -> list[list[Segment]]:
        """The micro-batches of the next sweep: a step of every running sequence, and as many waiting ones as fit.

        A sequence that can never fit fails alone (its `error` is set) and is among `take_failed`.
        """
        for prefix, block in continued_prefixes(chain(self._prefixes, self.running)):
            prefix.block, prefix.is_closed = self._cache.free_state(block), True
        intake = Intake([Segment(sequence, 1) for sequence in self.running])
        if not self._turns.is_of_steps(intake.segments, self.limits):
            self._let_in(intake)
        spare_blocks(intake.segments, self.limits.cached_rows_per_batch, self._cache)
        self._turns.take(intake.segments, intake.rows, self.limits, has_begun=intake.begun is not None)
        return self._cut(intake.segments)

    def _let_in(self, intake: Intake) -> None:
        """Admit sequences that will decode, then others, as far as transfers hide their time (docs/adr/0031)."""
        waiting, limits, cache, seats = self._waiting, self.limits, self._cache, self.limits.seats
        share, is_due = waiting.share(self.running), waiting.is_passing_due
        if waiting.decoding and (waiting.has_begun_decoding or not is_due):
            kept = min(share, max(1, seats // 4), seats - 1)  # a few seats are for the others
            most = 0 if is_due else most_admitted(self.running, waiting.decoding, limits, cache)
            self._fill(waiting.decoding, intake, seats - kept, 1, most)
        num_passing = 0
        if not intake.begun:
            most = most_hidden(intake, self.running, waiting.decoding, limits, cache)
            least = share if intake.num_steps or is_due else 0
            num_passing = self._fill(waiting.passing, intake, seats, least, most)
        waiting.note(num_passing, intake.begun)

    def _fill(self, queue: deque[Sequence], intake: Intake, seats: int, least: int, most: float) -> int:
        """Admit `least` sequences of a queue if there is space, and more up to `most` rows of prompts.

        Returns the number of sequences admitted as a whole.
        """
        count = admitted = 0
        while queue and len(self.running) < seats:
            sequence = queue[0]
            self._split(span for span in (*sequence.chain, sequence) if span.block is None)
            if is_too_long(sequence, self.limits):
                self._fail(queue.popleft(), no_room("attention", sequence, "its device memory (gpu-memory)"))
                continue
            new = self._enter(sequence, intake.entered)
            if new is None:
                if self.running or intake.entered:
                    break
                queue.popleft()
                cure = "the cache more memory (gpu-memory, cpu-memory, or a disk share)"
                self._fail(sequence, self._cache.refusal or no_room("the KV cache", sequence, cure))
                continue
            part = beginning(new, self.limits.rows_per_sweep, intake.rows)
            size = sum(map(rows_of, part))
            is_late = count >= least and admitted + size > most
            if is_late or (intake.segments and intake.rows + size > self.limits.rows_per_sweep):
                self._withdraw(new)
                break
            intake.take(part)
            if part[-1].span is not sequence:  # the rest comes with the next sweeps
                intake.begun = sequence
                self._withdraw(new[len(part) :])
                break
            count, admitted = count + 1, admitted + size
            self.running.append(queue.popleft())
        return count

    def cut_smaller(self, batches: list[list[Segment]], reason: str) -> list[list[Segment]]:
        """Cut the work of a sweep that ran out of memory into smaller micro-batches, for this sweep and later ones.

        They have half as many rows and, since what attention gathers of the cache grows with a decode step's context
        and not with its row, half as many cached ones. Prompts and prefixes of more rows are computed in pieces. Where
        none of this makes anything smaller, the largest sequence fails for `reason`, or all that share the largest
        prefix, and are among `take_failed`; the others restart with micro-batches as large as planned.
        """
        segments = [segment for batch in batches for segment in batch]
        if (found := smaller(self.limits, batches)) is not None:
            self.limits = found
            segments = self._in_pieces(self._begin_anew(segments))
        else:
            segments = self._begin_anew(self._lose(largest(segments), segments, reason))
            self.limits = self._planned
        return self._cut(segments) if segments else []

    def _lose(self, span: Span, segments: list[Segment], reason: str) -> list[Segment]:
        """Fail a sequence, or all that share a prefix; return what is left of a sweep's segments."""
        lost = [each for each in chain(self.running, self._waiting) if span is each or span in each.chain]
        leaving = set(map(id, lost))
        self.running = [each for each in self.running if id(each) not in leaving]
        self._waiting.drop(leaving)
        for sequence in lost:
            self._fail(sequence, f"{reason}; shorten {named(span, lost)}")
        needed = {id(part) for each in chain(self.running, self._waiting) for part in (each, *each.chain)}
        return [segment for segment in segments if id(segment.span) in needed]

    def _in_pieces(self, segments: list[Segment]) -> list[Segment]:
        """Split the work so that no span has more rows than a piece."""
        heads = self._split(segment.span for segment in segments)
        spans = {id(segment.span): (*heads.get(id(segment.span), ()), segment.span) for segment in segments}
        pieces = [
            segment if len(parts) == 1 else whole(part, self.limits)
            for segment, parts in zip(segments, spans.values(), strict=True)
            for part in parts
        ]
        for span in (segment.span for segment in segments if id(segment.span) in heads):
            if not place(span, heads[id(span)], self._cache):
                pieces = self._lose(
                    span, pieces, self._cache.refusal or "the KV cache has no room for a prompt in pieces"
                )
        return pieces

    def _split(self, spans: Iterable[Span]) -> dict[int, list[Prefix]]:
        heads = split(spans, self.limits, self._prefixes)
        for sequence in chain(self.running, self._waiting) if heads else ():
            sequence.follow(sequence.parent)
        return heads

    def _cut(self, segments: list[Segment]) -> list[list[Segment]]:
        return (rectangular_batches if self.limits.rectangular else packed_batches)(segments, self.limits)

    def _enter(self, sequence: Sequence, entered: set[int]) -> list[Segment] | None:
        """Admit `sequence`, or its first pieces, with storage in the cache: return its segments; None: no space now."""
        while (new := self._try_enter(sequence, entered)) is None:
            if self._evict(sequence.chain):
                continue
            if self.running or not sequence.chain:
                return None
            # The slot of a piece's state is free for another when the next one is computed.
            if self.limits.most_states and (part := self._try_enter(sequence, entered, partly=True)):
                return part
            self._unshare(sequence)
            if not (sequence.needs_cache or self.limits.most_states):  # nor do its pieces, if one sweep has them all
                self._split([sequence])
                return [whole(part, self.limits) for part in (*sequence.chain, sequence)]
        return new

    def _try_enter(self, sequence: Sequence, entered: set[int], *, partly: bool = False) -> list[Segment] | None:
        new: list[Segment] = []
        for prefix in sequence.chain:
            if not prefix.is_computed and id(prefix) not in entered:
                prefix.block = self._cache.allocate(len(prefix.tokens))
                if prefix.block is None:
                    break
                new.append(whole(prefix, self.limits))
        else:
            sequence.block = self._cache.allocate(sequence.capacity) if sequence.needs_cache else None
            if sequence.block is not None or not sequence.needs_cache:
                return [*new, whole(sequence, self.limits)]
        if not partly:
            self._withdraw(new)
        return new if partly else None

    def _evict(self, wanted: tuple[Prefix, ...]) -> bool:
        """Free the storage of prefixes that only waiting sequences share; they are computed again later."""
        idle = idle_prefixes(self._prefixes, self.running, wanted)
        for prefix in idle:
            self._free(prefix)
            prefix.forget()
        return bool(idle)

    def _withdraw(self, segments: list[Segment]) -> None:
        for segment in segments:
            self._free(segment.span)

    def _fail(self, sequence: Sequence, message: str) -> None:
        sequence.error = CapacityError(message)
        self._leave(sequence)
        self.failed.append(sequence)

    def finish(self, sequences: Iterable[Sequence]) -> None:
        """Remove ended sequences, and free their storage and that of prefixes that are no longer needed."""
        leaving = set(map(id, sequences))
        for sequence in (each for each in self.running if id(each) in leaving):
            self._leave(sequence)
        self.running = [sequence for sequence in self.running if id(sequence) not in leaving]

    def isolate(self, sequences: Iterable[Sequence]) -> None:
        """Restart running sequences, each in micro-batches of its own and without sharing.

        Where one sequence of a micro-batch yields NaN or infinity, its neighbours may, too (0 x NaN is NaN in masked
        attention): alone, each shows its own result.
        """
        suspects = list(sequences)
        self.finish(suspects)
        for sequence in suspects:
            sequence.restart_alone()
        self._waiting.put_back(suspects)

    def _begin_anew(self, segments: list[Segment]) -> list[Segment]:
        """Restart sequences whose states a failed sweep may have changed; return what is left of its segments."""
        if not self.limits.most_states:
            return segments
        changed = [sequence for sequence in self.running if sequence.cached]
        self.running = [sequence for sequence in self.running if not sequence.cached]
        for sequence in changed:
            is_closed = sequence.parent is not None and sequence.parent.is_closed
            self._leave(sequence) if is_closed else self._free(sequence)
            sequence.restart() if is_closed else sequence.begin_again()
        self._waiting.put_back(changed)
        return [segment for segment in segments if not segment.is_decode]

    def drop(self, sequences: Iterable[Sequence]) -> None:
        """Remove sequences whose callers are gone, running or waiting."""
        leaving = set(map(id, sequences))
        for sequence in (each for each in self._waiting if id(each) in leaving):
            self._leave(sequence)
        self._waiting.drop(leaving)
        self.finish(sequence for sequence in self.running if id(sequence) in leaving)

    def take_failed(self) -> list[Sequence]:
        """The sequences that failed since the last call because they can never fit."""
        failed, self.failed = self.failed, []
        return failed

    def _leave(self, sequence: Sequence) -> None:
        self._free(sequence)
        span: Span = sequence
        while (prefix := span.parent) is not None:
            prefix.num_users -= 1
            if prefix.num_users:
                break
            self._free(prefix)
            prefix.forget()
            self._prefixes.remove(prefix)
            span = prefix

    def _unshare(self, sequence: Sequence) -> None:
        shared = [token for prefix in sequence.chain for token in prefix.tokens]
        self._leave(sequence)
        sequence.take_back(shared)

    def _free(self, span: Span) -> None:
        if span.block is not None:
            self._cache.free(span.block)
            span.block = None
