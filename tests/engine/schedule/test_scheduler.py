"""Protects: sweeps keep their limits, compute prefixes before their users, serve everybody, and leak no room."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import Job
from engine.batch.decode_group import DecodeGroup
from engine.batch.micro_batch import MicroBatch
from engine.errors import CapacityError
from engine.memory.free_rows import FreeRows
from engine.planning.admission import Admission
from engine.planning.limits import Limits
from engine.schedule.block import Block
from engine.schedule.cutting import packed_batches, padded_length
from engine.schedule.scheduler import Scheduler
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix, Sequence


class Room:
    """Rows of one table of fixed size, of which the first `on_device` are said to be on the device."""

    def __init__(self, capacity: int, on_device: int = 10**9, num_slots: int = 0) -> None:
        """num_slots: for states, of which every span has one; 0 for spans that have none."""
        self.extents, self.slots = FreeRows(capacity), FreeRows(num_slots)
        self.on_device = on_device

    refusal: str | None = None

    def allocate(self, num_rows: int, *, with_state: bool = True) -> Block | None:
        with_state = with_state and bool(self.slots.capacity)
        if with_state and not self.slots.num_free:
            return None
        first = self.extents.take(num_rows)
        if first is None:
            return None
        slot = self.slots.take(1) if with_state else None
        return Block("device" if first < self.on_device else "host", first, num_rows, slot)

    def expect(self, sizes: list[int]) -> None:
        assert all(size > 0 for size in sizes)

    def num_off_device(self, num_rows: int) -> int:
        return max(0, min(num_rows, self.extents.capacity) - self.on_device)

    def free(self, block: Block) -> None:
        self.extents.give(block.first, block.num_rows)
        if block.slot is not None:
            self.slots.give(block.slot, 1)

    def free_state(self, block: Block) -> Block:
        assert block.slot is not None
        self.slots.give(block.slot, 1)
        return replace(block, slot=None)

    @property
    def is_empty(self) -> bool:
        return all(each.num_free == each.capacity == each.tail_free() for each in (self.extents, self.slots))


@dataclass
class Runner:
    """Plays the executor: computes what the scheduler says, with tokens out of thin air."""

    scheduler: Scheduler
    room: Room
    lengths: dict[int, int] = field(default_factory=dict)
    """How many tokens a sequence generates, where that is fewer than it may."""
    done: list[Sequence] = field(default_factory=list)
    failed: list[Sequence] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def sweep(self, num_short: int = 0) -> None:
        """num_short: how often the sweep runs out of memory and is cut smaller."""
        before = list(self.scheduler.running)
        batches = self.scheduler.next_sweep()
        for _ in range(num_short):
            batches = batches and self.scheduler.cut_smaller(batches, "too little memory")
        self.failed += self.scheduler.take_failed()
        self.check(before, batches)
        for segment in (segment for batch in batches for segment in batch):
            segment.span.cached += segment.num_rows
        leaving = []
        for sequence in self.scheduler.running:
            if sequence.job.max_new_tokens:
                sequence.tokens.append(1)
            count = len(sequence.generated)
            if count >= min(sequence.job.max_new_tokens, self.lengths.get(id(sequence), 10**9)):
                leaving.append(sequence)
        self.done += leaving
        self.scheduler.finish(leaving)
        # What outlives the sweep has a place; what has none was of use to nobody else.
        assert all(prefix.block is not None for prefix in self.scheduler._prefixes if prefix.is_computed)
        self.rows.append(sum(segment.num_rows for batch in batches for segment in batch))

    def check(self, before: list[Sequence], batches: list[list[Segment]]) -> None:
        limits, running = self.scheduler.limits, self.scheduler.running
        assert running[: len(before)] == before
        assert len(running) <= limits.sequences_per_batch * limits.batches
        segments = [segment for batch in batches for segment in batch]
        spans = [id(segment.span) for segment in segments]
        assert len(spans) == len(set(spans))
        assert {id(sequence) for sequence in running} == {
            id(segment.span) for segment in segments if isinstance(segment.span, Sequence)
        }
        total = sum(segment.num_rows for segment in segments)
        if not limits.rectangular:
            total = sum(segment.num_rows + segment.num_pad for segment in segments)
        pieces = self.pieces_without_room(before)
        assert total <= limits.rows_per_sweep or len(segments) == 1 or len(segments) == len(pieces) + 1
        seen: set[int] = set()
        for batch in batches:
            check_batch(batch, limits)
            for segment in batch:
                for prefix in segment.span.chain:  # computed in an earlier sweep, or before it in this one
                    assert prefix.is_computed or id(prefix) in seen
                    assert prefix.block is not None or id(prefix) in seen
                parent = segment.span.parent
                if limits.most_states and parent is not None and not segment.past and id(parent) not in seen:
                    assert parent.block is not None
                    assert parent.block.slot is not None  # a span begins with the state behind its parent
                seen.add(id(segment.span))
                check_segment(segment, limits)
        passing = [segment for segment in segments if isinstance(segment.span, Prefix) and segment.span.block is None]
        passing = [segment for segment in passing if segment.span not in pieces]
        assert sum(segment.num_rows for segment in passing) <= limits.cached_rows_per_batch
        assert total == 0 or batches

    def pieces_without_room(self, before: list[Sequence]) -> tuple[Prefix, ...]:
        """Of a sequence that keeps nothing and comes first, where the room cannot hold them even alone."""
        new = [sequence for sequence in self.scheduler.running[:1] if sequence not in before]
        chains = [sequence.chain for sequence in new if not sequence.needs_cache]
        return next(
            (each for each in chains if sum(len(prefix.tokens) for prefix in each) > self.room.extents.capacity), ()
        )

    def run(self, most_sweeps: int) -> None:
        for _ in range(most_sweeps):
            if self.scheduler.is_idle:
                break
            self.sweep()
        assert self.scheduler.is_idle
        assert self.room.is_empty
        assert self.scheduler._prefixes == []


def groups_of(runner: Runner) -> list[DecodeGroup]:
    """The decode groups of the next sweep, which is one micro-batch."""
    (batch,) = runner.scheduler.next_sweep()
    return MicroBatch(batch, torch.device("cpu"), runner.scheduler.limits).decode_groups


def check_batch(batch: list[Segment], limits: Limits) -> None:
    assert sum(isinstance(segment.span, Sequence) for segment in batch) <= limits.sequences_per_batch
    assert batch[-1].end <= limits.rows_per_batch or len(batch) == 1
    assert sum(isinstance(segment.span, Prefix) for segment in batch) <= (limits.most_states or len(batch))
    end = 0
    for segment in batch:
        assert segment.begin == end
        assert segment.first == segment.begin + segment.lead
        end = segment.end
    if limits.rectangular:  # each at the right edge
        assert {segment.end - segment.begin for segment in batch} == {batch[-1].end // len(batch)}
        assert {segment.num_pad for segment in batch} == {0}
        assert len({(segment.is_decode, isinstance(segment.span, Prefix)) for segment in batch}) == 1
        reach = max(segment.span.start + segment.past + segment.num_rows for segment in batch)
        assert len(batch) * reach <= limits.cached_rows_per_batch or len(batch) == 1
        return
    kinds = [segment.is_decode for segment in batch]
    assert kinds == sorted(kinds, reverse=True)
    groups = MicroBatch(batch, torch.device("cpu"), limits).decode_groups
    assert [segment for group in groups for segment in group.segments] == batch[: sum(kinds)]
    for group in groups:
        check_stored_runs(group, limits)
        is_left = limits.reads_in_place if group.is_on_device else limits.reads_on_host and group.tier == "host"
        if is_left and (group.is_on_device or limits.reads_in_place or not group.chain):
            continue
        assert len(group.segments) * group.length <= limits.cached_rows_per_batch or len(group.segments) == 1
        staged = sum(run.end - run.first for run in group.stored_runs)
        assert staged <= limits.cached_rows_per_batch or len(group.segments) == 1


def check_stored_runs(group: DecodeGroup, limits: Limits) -> None:
    """Staged rows are the own tokens of each sequence, where the borders say; runs lie apart."""
    staged = [row for run in group.stored_runs for row in range(run.first, run.end)]
    for segment, first in zip(group.segments, group.own_borders.tolist(), strict=False):
        block = segment.span.block
        assert block is not None
        rows = [block.first + i for i in range(segment.past + segment.num_rows)]
        assert group.tier == block.tier
        if group.is_on_device:
            assert first == block.first
        else:
            assert staged[first : first + len(rows)] == rows
    for one, two in itertools.pairwise(group.stored_runs):
        assert not 0 <= two.first - one.end <= limits.gap_rows


def check_segment(segment: Segment, limits: Limits) -> None:
    span = segment.span
    assert segment.past == span.cached
    unfed = isinstance(span, Sequence) and span.job.max_new_tokens == 0 and len(span.tokens) > 1
    assert segment.past + segment.num_rows == len(span.tokens) - unfed  # all that is not computed yet
    if isinstance(span, Sequence):
        assert (span.block is not None) == span.needs_cache
        if span.block is not None:
            assert span.block.num_rows >= span.num_prompt + span.job.max_new_tokens - 1
        rows = segment.num_rows if segment.is_decode else padded_length(segment.num_rows, limits.pad)
        taken = segment.end - segment.begin
        assert taken >= rows if limits.rectangular else taken == rows
    else:
        assert isinstance(span, Prefix)
        assert span.block is None or span.block.num_rows == len(span.tokens)
        assert segment.num_pad == 0


def make_runner(
    capacity: int, *, on_device: int = 10**9, num_slots: int = 10**6, share_prefix: bool = True, **limits: object
) -> Runner:
    values: dict[str, object] = {
        "sequences_per_batch": 64, "batches": 4, "rows_per_batch": 256, "cached_rows_per_batch": 10**6,
        "rows_per_sweep": 10**6,
    } | limits  # fmt: skip
    room = Room(capacity, on_device, num_slots if limits.get("most_states") else 0)
    return Runner(Scheduler(Limits(**values), room, share_prefix=share_prefix), room)  # type: ignore[arg-type]


@st.composite
def job_sets(draw: st.DrawFn) -> list[Job]:
    rng = random.Random(draw(st.integers(0, 10**6)))
    prompts: list[list[int]] = []
    for _ in range(draw(st.integers(1, 14))):
        start = rng.choice(prompts)[: rng.randrange(60)] if prompts and rng.random() < 0.8 else []
        prompts.append([*start, *(rng.randrange(3) for _ in range(rng.randrange(1, 30)))])
    counts = [rng.choice([0, 1, 2, 5, 9]) for _ in prompts]
    return [
        Job(prompt=prompt, max_new_tokens=count, prompt_logprobs=count == 0 or rng.random() < 0.3)
        for prompt, count in zip(prompts, counts, strict=True)
    ]


@settings(deadline=None, max_examples=150)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 6), job_sets()), min_size=1, max_size=4),
    capacity=st.integers(20, 300),
    limits=st.fixed_dictionaries(
        {
            "sequences_per_batch": st.integers(1, 5),
            "batches": st.integers(1, 4),
            "rows_per_batch": st.sampled_from([16, 64, 256]),
            "rows_per_piece": st.sampled_from([None, 4, 16, 64]),
            "cached_rows_per_batch": st.sampled_from([1, 40, 10**6]),
            "gap_rows": st.sampled_from([0, 5]),
            "rows_per_sweep": st.sampled_from([1, 60, 10**6]),
            "pad": st.sampled_from([None, None, "bucket", 100]),
            "rectangular": st.booleans(),
            "reads_in_place": st.booleans(),
            "reads_on_host": st.booleans(),
            "admission": st.sampled_from([None, Admission(rows_beside_weights=9, rows_beside_cached_row=0.2)]),
            "rows_between_fetches": st.sampled_from([None, 1, 30]),
            "most_states": st.sampled_from([0, 2]),
        }
    ),
    on_device=st.integers(0, 300),
    num_slots=st.sampled_from([2, 4, 10**6]),
    share_prefix=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_everybody_is_served_within_the_limits(
    arrivals: list[tuple[int, list[Job]]],
    capacity: int,
    limits: dict[str, object],
    on_device: int,
    num_slots: int,
    share_prefix: bool,
    seed: int,
) -> None:
    rng = random.Random(seed)
    runner = make_runner(capacity, on_device=on_device, num_slots=num_slots, share_prefix=share_prefix, **limits)
    everybody: list[Sequence] = []
    dropped: list[Sequence] = []
    for wait, jobs in arrivals:
        for _ in range(wait):
            runner.sweep()
        sequences = [Sequence.of(job) for job in jobs]
        runner.lengths |= {id(sequence): rng.randrange(1, 12) for sequence in sequences}
        runner.scheduler.add(sequences)
        everybody += sequences
        if rng.random() < 0.3:
            gone = set(map(id, (*runner.done, *runner.failed, *dropped)))
            leaving = [sequence for sequence in everybody if id(sequence) not in gone and rng.random() < 0.3]
            runner.scheduler.drop(leaving)
            dropped += leaving
    runner.run(sum(len(each.job.prompt) + 1 + each.job.max_new_tokens for each in everybody))
    ended = [*runner.done, *runner.failed, *dropped]
    assert sorted(map(id, ended)) == sorted(map(id, everybody))
    for sequence in everybody:
        needed = len(sequence.job.prompt) + sequence.job.max_new_tokens - 1 if sequence.job.max_new_tokens > 1 else 0
        if sequence in runner.failed:  # only what cannot fit even alone
            assert needed > capacity
            assert isinstance(sequence.error, CapacityError)
        elif sequence in runner.done:
            assert needed <= capacity


def words(seed: float, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(count)]


@settings(deadline=None, max_examples=40)
@given(
    capacity=st.integers(70, 200),
    limits=st.fixed_dictionaries(
        {
            "sequences_per_batch": st.integers(1, 5),
            "batches": st.integers(1, 2),
            "rows_per_batch": st.just(64),
            "rows_per_piece": st.sampled_from([None, 8]),
            "rows_per_sweep": st.sampled_from([1, 30, 60, 10**6]),
            "admission": st.sampled_from([None, Admission(rows_beside_weights=9, rows_beside_cached_row=0.2)]),
            "most_states": st.sampled_from([0, 2]),
        }
    ),
    counts=st.lists(st.sampled_from([1, 2, 5, 9]), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
)
def test_everybody_is_served_however_many_come_after(
    capacity: int, limits: dict[str, object], counts: list[int], seed: int
) -> None:
    """Three always wait to decode; of jobs there, by hand, no more than 20 are ahead, of 9 tokens and 8 pieces each."""
    rng = random.Random(seed)
    runner = make_runner(capacity, on_device=0, **limits)

    def some(count: int) -> Sequence:
        stem = words(rng.randrange(3), 40) if rng.random() < 0.3 else []
        return Sequence.of(Job(prompt=[*stem, *words(rng.random(), rng.randrange(1, 24))], max_new_tokens=count))

    def sweep() -> None:
        waiting = runner.scheduler._waiting
        while sum(each.needs_cache for each in waiting) < 3:
            runner.scheduler.add([some(rng.choice([2, 5, 9]))])
        runner.sweep()

    for _ in range(rng.randrange(8)):
        sweep()
    early = [some(count) for count in counts]
    runner.scheduler.add(early)
    for _ in range(20 * (9 + 8)):
        if all(each in runner.done for each in early):
            return
        sweep()
    left = [each.job.max_new_tokens for each in early if each not in runner.done]
    raise AssertionError(f"of jobs of {counts} tokens, those of {left} are never served")


def test_a_prefix_is_computed_once_and_kept_while_somebody_waits_for_it() -> None:
    runner = make_runner(10_000, sequences_per_batch=1, batches=1)
    prompts = [[*words(0, 100), *words(i, 5)] for i in range(1, 6)]
    runner.scheduler.add([Sequence.of(Job(prompt=prompt, max_new_tokens=1)) for prompt in prompts])
    runner.run(10)
    assert runner.rows == [105, 5, 5, 5, 5]


def test_a_prefix_that_only_waiting_sequences_share_makes_room() -> None:
    """Somebody who needs the whole cache is let in, and the prefix is computed again for the others."""
    runner = make_runner(120, sequences_per_batch=1, batches=1)
    sharers = [Sequence.of(Job(prompt=[*words(0, 100), *words(i, 5)], max_new_tokens=2)) for i in range(1, 4)]
    runner.scheduler.add(sharers[:2])
    runner.sweep()
    big = Sequence.of(Job(prompt=words(9, 118), max_new_tokens=3))
    late = sharers[2]
    runner.scheduler.drop([sharers[1]])
    runner.scheduler.add([big, late])
    assert late.chain == sharers[0].chain
    runner.run(20)
    assert runner.failed == []
    assert runner.rows == [105, 1, 118, 1, 1, 105, 1]


def test_pieces_of_long_prompts_keep_one_state() -> None:
    """Prompts of 40 tokens in four pieces; once they are computed, each has the state behind its last token alone."""
    runner = make_runner(1000, rows_per_piece=10, most_states=2, num_slots=6)
    sequences = [Sequence.of(Job(prompt=words(i, 40), max_new_tokens=9)) for i in range(3)]
    runner.scheduler.add(sequences)
    running = []
    for _ in range(3):
        runner.sweep()
        running.append(len(runner.scheduler.running))
    assert running == [1, 2, 3]
    alone = make_runner(1000, rows_per_piece=10, most_states=2, num_slots=2)
    alone.scheduler.add([Sequence.of(Job(prompt=words(0, 40), max_new_tokens=2))])
    alone.run(9)
    assert alone.rows == [20, 10, 10, 1]
    same = Sequence.of(Job(prompt=[*words(0, 40), 5], max_new_tokens=1))
    runner.scheduler.add([same])
    assert same.chain == ()  # the states between pieces are gone
    runner.run(20)
    assert runner.failed == []


def test_pieces_of_a_prompt_need_no_state_each_where_a_sweep_ran_out_of_memory() -> None:
    """There are two states: of 300 tokens that two prompts share, and of the one that comes first."""
    runner = make_runner(1000, most_states=2, num_slots=2)
    same = words(0, 300)
    sequences = [Sequence.of(Job(prompt=[*same, *words(i, 150)], max_new_tokens=3)) for i in (1, 2)]
    runner.scheduler.add(sequences)
    runner.sweep(num_short=2)
    assert (runner.failed, runner.rows) == ([], [450])
    assert max(len(span.tokens) for span in (*sequences[0].chain, sequences[0])) <= 113  # a quarter
    later = Sequence.of(Job(prompt=[*same[:100], *words(3, 9)], max_new_tokens=1))
    runner.scheduler.add([later])
    assert later.chain == ()  # the pieces of what is shared have no state that it could continue
    runner.run(20)
    assert runner.failed == []
    assert [each.generated for each in runner.done] == [[1] * 3, [1], [1] * 3]


def test_who_begins_anew_continues_the_prefixes_that_are_still_there() -> None:
    """A failed sweep has changed the states of decode steps, not the one behind the 100 tokens that they share."""
    runner = make_runner(1000, most_states=4)
    prompts = [[*words(0, 100), *words(i, 5)] for i in (1, 2)]
    runner.scheduler.add([Sequence.of(Job(prompt=prompt, max_new_tokens=4)) for prompt in prompts])
    runner.sweep()
    runner.sweep()
    assert runner.scheduler.cut_smaller(runner.scheduler.next_sweep(), "too little memory") == []
    runner.run(20)
    assert runner.rows == [110, 2, 10, 2, 2, 2]
    assert [each.generated for each in runner.done] == [[1] * 4] * 2


def test_a_prefix_known_without_its_logprobs_is_not_shared_with_who_wants_them() -> None:
    runner = make_runner(1000)
    start = words(0, 50)
    runner.scheduler.add([Sequence.of(Job(prompt=[*start, i], max_new_tokens=9)) for i in range(2)])
    runner.sweep()
    scoring = Sequence.of(Job(prompt=[*start, 7, 3], max_new_tokens=0, prompt_logprobs=True))
    other = Sequence.of(Job(prompt=[*start, 8], max_new_tokens=1))
    runner.scheduler.add([scoring, other])
    assert scoring.chain == ()
    assert len(other.chain) == 1
    runner.sweep()
    assert runner.rows == [52, 2 + 51 + 1]  # the last token of a job that only scores is not computed
    runner.run(20)


def test_decode_steps_bring_no_more_of_the_cache_than_allowed() -> None:
    runner = make_runner(1000, cached_rows_per_batch=100)
    runner.scheduler.add([Sequence.of(Job(prompt=words(i, 30), max_new_tokens=9)) for i in range(7)])
    runner.sweep()
    assert [len(group.segments) for group in groups_of(runner)] == [3, 3, 1]  # three of 31 rows each


def test_decode_steps_that_are_read_in_place_gather_nothing() -> None:
    """Of seven sequences of 38 rows, four are on the device."""
    runner = make_runner(1000, on_device=4 * 38, cached_rows_per_batch=62, reads_in_place=True)
    runner.scheduler.add([Sequence.of(Job(prompt=words(i, 30), max_new_tokens=9)) for i in range(7)])
    runner.sweep()
    groups = groups_of(runner)
    assert [(group.tier, len(group.segments)) for group in groups] == [("device", 4), ("host", 2), ("host", 1)]


@pytest.mark.parametrize(
    ("shared", "in_place", "expected"), [(0, False, [7]), (0, True, [7]), (24, True, [7]), (24, False, [3, 3, 1])]
)
def test_what_is_attended_to_on_the_host_is_not_gathered(shared: int, in_place: bool, expected: list[int]) -> None:
    """But for the own tokens behind a prefix, where no kernel tells how to merge both."""
    runner = make_runner(
        1000, on_device=24 if shared else 0, cached_rows_per_batch=100, reads_on_host=True, reads_in_place=in_place
    )
    prefix = words(99, shared)
    jobs = [Job(prompt=prefix + words(i, 30), max_new_tokens=9) for i in range(7)]
    runner.scheduler.add([Sequence.of(job) for job in jobs])
    runner.sweep()
    assert [len(group.segments) for group in groups_of(runner)] == expected
    assert {group.tier for group in groups_of(runner)} == {"host"}


def test_neighbours_in_the_cache_are_brought_in_one_copy() -> None:
    """Blocks of 38 rows, of which 31 are wanted: a copy takes 7 rows besides, if it may."""
    for gap_rows, runs in ((6, [(38 * i, 38 * i + 31) for i in range(4)]), (7, [(0, 3 * 38 + 31)])):
        runner = make_runner(1000, on_device=0, gap_rows=gap_rows)
        runner.scheduler.add([Sequence.of(Job(prompt=words(i, 30), max_new_tokens=9)) for i in range(4)])
        runner.sweep()
        (group,) = groups_of(runner)
        assert [(run.first, run.end) for run in group.stored_runs] == runs


def test_the_order_of_decode_steps_does_not_depend_on_where_prefixes_lie_in_memory() -> None:
    prefixes = sorted((Prefix(tokens=[number]) for number in range(20)), key=id, reverse=True)
    segments = []
    for place, prefix in enumerate([*prefixes, *prefixes]):
        sequence = Sequence.of(Job(prompt=[1, 2], max_new_tokens=4))
        sequence.follow(prefix)
        sequence.cached, sequence.block = 1, Block("host", 10 * place, 10)
        segments.append(Segment(sequence, 1))
    (batch,) = packed_batches(segments, make_runner(10**6).scheduler.limits)
    assert [segment.span.parent for segment in batch] == [prefix for prefix in prefixes for _ in range(2)]


def test_what_is_brought_besides_counts() -> None:
    """Blocks of 60 rows, of which 31 are wanted: with the 29 behind each, two are 91 rows, and three 151."""
    runner = make_runner(1000, on_device=0, gap_rows=29, cached_rows_per_batch=130, reads_in_place=True)
    runner.scheduler.add([Sequence.of(Job(prompt=words(i, 30), max_new_tokens=31)) for i in range(4)])
    runner.sweep()
    groups = groups_of(runner)
    assert [[run.end - run.first for run in group.stored_runs] for group in groups] == [[91], [91]]


def admitted(runner: Runner, count: int) -> list[int]:
    """How many sequences enter in each of so many sweeps."""
    entered = []
    for _ in range(count):
        before = set(map(id, runner.scheduler.running))
        runner.scheduler.next_sweep()
        entered.append(sum(id(sequence) not in before for sequence in runner.scheduler.running))
    return entered


def test_prompts_come_in_as_far_as_the_link_hides_them() -> None:
    """By hand: 4 at once keep 4 x (20 + 4) rows, 96 - 40 of them off the device; 56 x 0.5 + 12 rows are 2 prompts."""
    pace = Admission(rows_beside_weights=12, rows_beside_cached_row=0.5)
    runner = make_runner(10_000, on_device=40, sequences_per_batch=4, batches=1, admission=pace)
    runner.scheduler.add([Sequence.of(Job(prompt=words(i, 20), max_new_tokens=5)) for i in range(9)])
    assert admitted(runner, 3) == [2, 2, 0]


def test_a_prompt_longer_than_is_hidden_comes_in_alone() -> None:
    pace = Admission(rows_beside_weights=0, rows_beside_cached_row=0.01)
    runner = make_runner(10_000, on_device=0, admission=pace)
    runner.scheduler.add([Sequence.of(Job(prompt=words(i, 20), max_new_tokens=5)) for i in range(3)])
    assert admitted(runner, 4) == [1, 1, 1, 0]


def test_all_prompts_come_in_where_more_of_weights_crosses_the_link_than_of_the_cache() -> None:
    for on_device, weights in ((0, 100.0), (10**6, 0.0)):
        pace = Admission(rows_beside_weights=weights, rows_beside_cached_row=0.5)
        runner = make_runner(10_000, on_device=on_device, sequences_per_batch=4, batches=1, admission=pace)
        runner.scheduler.add([Sequence.of(Job(prompt=words(i, 20), max_new_tokens=5)) for i in range(9)])
        assert admitted(runner, 1) == [4]


def test_jobs_that_keep_nothing_are_not_held_back() -> None:
    pace = Admission(rows_beside_weights=0, rows_beside_cached_row=0.01)
    runner = make_runner(10_000, on_device=0, admission=pace)
    runner.scheduler.add([Sequence.of(Job(prompt=words(0, 20), max_new_tokens=5))])
    runner.scheduler.add([Sequence.of(Job(prompt=words(i, 20), max_new_tokens=1)) for i in range(1, 6)])
    assert admitted(runner, 1) == [6]


def test_jobs_of_one_token_come_in_beside_decode_steps() -> None:
    """By hand: 2 answers of 9 tokens decode in 8 sweeps behind the first, so 40 prompts come in by fives.

    The link hides more in the second case: with 2 x (20 + 8) cached rows off the device, 56 + 44 rows, five prompts.
    """
    for weights, expected in ((1, [0, 5, 5, 5, 5, 5, 5, 5, 5]), (104, [3, 8, 8, 8, 8, 5, 0, 0, 0])):
        pace = Admission(rows_beside_weights=weights, rows_beside_cached_row=1)
        runner = make_runner(10_000, on_device=0, admission=pace)
        runner.scheduler.add([Sequence.of(Job(prompt=words(i, 20), max_new_tokens=1)) for i in range(2, 42)])
        runner.scheduler.add([Sequence.of(Job(prompt=words(i, 20), max_new_tokens=9)) for i in range(2)])
        runner.run(9)
        assert [rows // 20 for rows in [runner.rows[0] - 40, *(rows - 2 for rows in runner.rows[1:])]] == expected


def test_who_has_most_to_say_comes_first_with_those_who_share_its_prefix() -> None:
    runner = make_runner(10_000, sequences_per_batch=3, batches=1)
    short = [Job(prompt=words(i, 20), max_new_tokens=3) for i in range(2)]
    group = [Job(prompt=[*words(9, 40), i], max_new_tokens=count) for i, count in ((1, 2), (2, 8))]
    sequences = [Sequence.of(job) for job in (*short, *group)]
    runner.scheduler.add(sequences)
    runner.scheduler.next_sweep()
    assert runner.scheduler.running[:2] == sequences[2:]
    assert len(runner.scheduler.running) == 3


def test_a_seat_is_kept_for_jobs_of_one_token() -> None:
    """Four seats, and answers enough to fill them for long."""
    runner = make_runner(10_000, sequences_per_batch=4, batches=1)
    long = [Sequence.of(Job(prompt=words(i, 20), max_new_tokens=5)) for i in range(20)]
    runner.scheduler.add(long)
    runner.scheduler.add([Sequence.of(Job(prompt=words(i, 20), max_new_tokens=1)) for i in range(20, 23)])
    for _ in range(4):
        runner.sweep()
    assert sum(sequence.job.max_new_tokens == 1 for sequence in runner.done) == 3


def test_room_that_others_would_take_goes_to_a_job_of_one_token_that_found_none() -> None:
    """Room for two answers of 24 rows; the prefix of 32 that two jobs share needs what both leave."""
    runner = make_runner(48)
    runner.scheduler.add([Sequence.of(Job(prompt=words(i, 20), max_new_tokens=5)) for i in range(8)])
    runner.scheduler.add([Sequence.of(Job(prompt=[*words(9, 32), i, i], max_new_tokens=1)) for i in range(2)])
    runner.run(40)
    answered = [sequence.job.max_new_tokens for sequence in runner.done]
    assert answered.index(1) == 2
    assert len(answered) == 10


@pytest.mark.parametrize(
    ("capacity", "limits", "count", "job", "most"),
    [
        pytest.param(10_000, {"sequences_per_batch": 2, "batches": 1}, 8, (20, 4), 24, id="shorter"),
        pytest.param(400, {"rows_per_sweep": 60, "rows_per_piece": 50}, 30, (300, 4), 40, id="in pieces"),
        pytest.param(10_000, {"sequences_per_batch": 8, "rows_per_sweep": 50}, 2, (30, 1), 6, id="rows"),
        pytest.param(400, {"sequences_per_batch": 1, "batches": 1}, 4, (30, 1), 10, id="seats"),
    ],
)
def test_nobody_who_comes_later_is_served_for_ever(
    capacity: int, limits: dict[str, object], count: int, job: tuple[int, int], most: int
) -> None:
    """Three others always wait; of those of 8 tokens, three are ahead of the first job, and two run at once."""
    runner = make_runner(capacity, **limits)
    early = Sequence.of(Job(prompt=words(5, job[0]), max_new_tokens=job[1]))
    number = itertools.count(100)

    def more() -> list[Sequence]:
        missing = 3 - sum(each.needs_cache for each in runner.scheduler._waiting)
        return [Sequence.of(Job(prompt=words(next(number), 20), max_new_tokens=count)) for _ in range(missing)]

    for sweep in range(most):
        runner.scheduler.add(more())
        if sweep == 0:
            runner.scheduler.add([early])
        runner.sweep()
    assert early in runner.done


def test_room_is_kept_for_a_job_of_one_token_while_others_leave_one_by_one() -> None:
    """Room for three answers of 24 rows, which end in different sweeps; a prefix of 44 needs that of two."""
    runner = make_runner(72)
    early = [Sequence.of(Job(prompt=[*words(9, 44), i, i], max_new_tokens=1)) for i in range(2)]
    for sweep in range(16):
        if sweep in (0, 1, 3) or sweep > 3:
            runner.scheduler.add([Sequence.of(Job(prompt=words(100 + sweep, 20), max_new_tokens=5))])
        if sweep == 3:
            runner.scheduler.add(early)
        runner.sweep()
    assert all(each in runner.done for each in early)


def test_prompts_are_computed_between_decode_steps_that_are_fetched() -> None:
    """By hand: 8 steps and 6 x 20 rows in parts of 50 are three, each with room for two prompts beside its steps."""
    for on_device, expected in ((0, [(2, 2), (3, 2), (3, 2)]), (10**6, [(8, 6)])):
        runner = make_runner(10_000, on_device=on_device, rows_between_fetches=50)
        runner.scheduler.add([Sequence.of(Job(prompt=words(i, 20), max_new_tokens=5)) for i in range(8)])
        runner.sweep()
        runner.scheduler.add([Sequence.of(Job(prompt=words(i, 20), max_new_tokens=5)) for i in range(10, 16)])
        batches = runner.scheduler.next_sweep()
        steps = [sum(segment.is_decode for segment in batch) for batch in batches]
        assert [(count, len(batch) - count) for count, batch in zip(steps, batches, strict=True)] == expected


def test_one_token_jobs_need_no_cache_of_their_own() -> None:
    runner = make_runner(0)
    jobs = [Job(prompt=words(i, 50), max_new_tokens=1) for i in range(3)]
    jobs += [Job(prompt=[*words(9, 50), i], max_new_tokens=0, prompt_logprobs=True) for i in range(3)]
    runner.scheduler.add([Sequence.of(job) for job in jobs])
    runner.run(10)
    assert len(runner.done) == 6


def test_padding() -> None:
    assert [padded_length(rows, None) for rows in (1, 77)] == [1, 77]
    assert [padded_length(rows, "bucket") for rows in (1, 64, 65, 128, 129, 300)] == [64, 64, 128, 128, 256, 512]
    assert [padded_length(rows, 100) for rows in (1, 100)] == [100, 100]


def test_a_fixed_pad_shares_no_prefix() -> None:
    runner = make_runner(10_000, pad=120)
    runner.scheduler.add([Sequence.of(Job(prompt=[*words(0, 100), i], max_new_tokens=1)) for i in range(3)])
    runner.run(1)
    assert runner.rows == [303]


def test_prefixes_of_jobs_without_cache_take_room_only_if_they_outlive_the_sweep() -> None:
    """Three runs of scoring jobs, of which a sweep takes two and a half: only the third prefix is kept."""
    runs = [[Job(prompt=[run] * 40 + [number, 7], max_new_tokens=1) for number in range(8)] for run in range(3)]
    runner = make_runner(10**6, sequences_per_batch=20, batches=1)
    runner.scheduler.add(Sequence.of(job) for run in runs for job in run)
    batches = runner.scheduler.next_sweep()
    prefixes = [segment.span for segment in batches[0] if isinstance(segment.span, Prefix)]
    assert [prefix.block is not None for prefix in prefixes] == [False, False, True]


def test_prefixes_of_generating_jobs_take_room() -> None:
    runner = make_runner(10**6)
    runner.scheduler.add(Sequence.of(Job(prompt=[1] * 40 + [number, 7], max_new_tokens=2)) for number in range(8))
    (batch,) = runner.scheduler.next_sweep()
    (prefix,) = (segment.span for segment in batch if isinstance(segment.span, Prefix))
    assert prefix.block is not None
