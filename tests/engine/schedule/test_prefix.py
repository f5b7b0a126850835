"""Protects: prefixes are shared at exact token borders, wherever that saves work and nowhere else."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from engine import Job
from engine.schedule import block as blocks
from engine.schedule.passing import continued_prefixes
from engine.schedule.prefix import MIN_SHARED_TOKENS, common_length, share_prefixes
from engine.schedule.scheduler import Limits, Scheduler, Segment
from engine.schedule.sequence import Prefix, Sequence


def sequences_of(prompts: list[list[int]]) -> list[Sequence]:
    return [Sequence.of(Job(prompt=prompt)) for prompt in prompts]


def whole(sequence: Sequence) -> list[int]:
    """The prompt, put together from the chain and what is the sequence's own."""
    return [token for span in (*sequence.chain, sequence) for token in span.tokens]


def assert_consistent(sequences: list[Sequence], live: list[Prefix] | None = None) -> None:
    """User counts are right, positions continue, and no prefix has fewer users than it is worth."""
    users: Counter[int] = Counter()
    prefixes = {id(prefix): prefix for sequence in sequences for prefix in sequence.chain}
    prefixes |= {id(prefix): prefix for prefix in live or []}
    for span in (*sequences, *prefixes.values()):
        if span.parent is not None:
            users[id(span.parent)] += 1
    for key, prefix in prefixes.items():
        assert prefix.num_users == users[key]
        if prefix not in (live or []):
            assert users[key] >= 2
            assert (users[key] - 1) * len(prefix.tokens) >= MIN_SHARED_TOKENS
    for sequence in sequences:
        position = 0
        for span in (*sequence.chain, sequence):
            assert span.start == position
            position += len(span.tokens)
        assert len(sequence.tokens) == sequence.num_prompt >= 1


def num_computed(sequences: list[Sequence]) -> int:
    """Tokens to compute: each prefix once."""
    prefixes = {id(prefix): prefix for sequence in sequences for prefix in sequence.chain}
    return sum(len(span.tokens) for span in (*sequences, *prefixes.values()))


def words(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(500) for _ in range(count)]


@st.composite
def prompt_sets(draw: st.DrawFn) -> list[list[int]]:
    """Prompts grown from each other, so that they share and nest at random places."""
    rng = random.Random(draw(st.integers(0, 10**6)))
    prompts: list[list[int]] = []
    for _ in range(draw(st.integers(1, 25))):
        start = rng.choice(prompts)[: rng.randrange(80)] if prompts and rng.random() < 0.8 else []
        prompts.append([*start, *(rng.randrange(3) for _ in range(rng.randrange(0 if start else 1, 40)))])
    return prompts


@settings(deadline=None)
@given(prompts=prompt_sets(), later=prompt_sets())
def test_prompts_stay_whole_and_sharing_never_costs(prompts: list[list[int]], later: list[list[int]]) -> None:
    sequences = sequences_of(prompts)
    ordered = share_prefixes(sequences)
    assert sorted(map(id, ordered)) == sorted(map(id, sequences))
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert whole(sequence) == prompt
    assert_consistent(sequences)
    assert num_computed(sequences) <= sum(map(len, prompts))
    # More come while these are in use.
    live = list({id(prefix): prefix for sequence in sequences for prefix in sequence.chain}.values())
    joining = sequences_of(later)
    share_prefixes(joining, live)
    for sequence, prompt in zip(joining, later, strict=True):
        assert whole(sequence) == prompt
    assert_consistent([*sequences, *joining], live)


@settings(deadline=None)
@given(prompts=prompt_sets())
def test_users_of_a_prefix_are_neighbours(prompts: list[list[int]]) -> None:
    ordered = share_prefixes(sequences_of(prompts))
    for prefix in {id(prefix): prefix for sequence in ordered for prefix in sequence.chain}.values():
        places = [place for place, sequence in enumerate(ordered) if prefix in sequence.chain]
        assert places == list(range(places[0], places[-1] + 1))


@given(left=st.lists(st.integers(0, 1), max_size=30), right=st.lists(st.integers(0, 1), max_size=30))
def test_common_length(left: list[int], right: list[int]) -> None:
    expected = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )
    assert common_length(left, right) == expected


def test_two_levels_nest() -> None:
    """Five-shot questions with four choices each: the examples are computed once, each question's stem once."""
    examples, stems = words(0, 100), [words(i, 30) for i in range(1, 4)]
    prompts = [[*examples, *stem, choice] for stem in stems for choice in range(500, 504)]
    sequences = sequences_of(prompts)
    share_prefixes(sequences)
    assert {len(sequence.chain) for sequence in sequences} == {2}
    assert num_computed(sequences) == 100 + 3 * 30 + 12
    assert len({id(sequence.chain[0]) for sequence in sequences}) == 1


def test_the_last_token_is_always_own() -> None:
    prompt = words(0, 50)
    sequences = sequences_of([prompt, prompt, prompt[:30]])
    share_prefixes(sequences)
    assert [len(sequence.tokens) for sequence in sequences] == [1, 1, 1]
    assert num_computed(sequences) == 29 + 20 + 3


def test_a_job_that_only_scores_keeps_a_row_of_its_own() -> None:
    """Its last token is never computed, so the one before it is its own, too."""
    prompt = words(0, 50)
    jobs = [Job(prompt=[*prompt, last], max_new_tokens=0, prompt_logprobs=True) for last in (1, 2, 3)]
    sequences = [Sequence.of(job) for job in [*jobs, Job(prompt=prompt[:1], max_new_tokens=0, prompt_logprobs=True)]]
    share_prefixes(sequences)
    assert [(len(sequence.tokens), sequence.num_rows) for sequence in sequences] == [(2, 1)] * 3 + [(1, 1)]
    [prefix] = {id(prefix): prefix for sequence in sequences for prefix in sequence.chain}.values()
    late = [Sequence.of(Job(prompt=prompt, max_new_tokens=count, prompt_logprobs=True)) for count in (0, 1)]
    share_prefixes(late, [prefix])
    assert [len(sequence.chain) for sequence in late] == [0, 1]


def test_short_or_lone_prefixes_are_not_shared() -> None:
    start = words(0, MIN_SHARED_TOKENS - 1)
    pair = sequences_of([[*start, 501], [*start, 502]])
    share_prefixes(pair)
    assert [sequence.chain for sequence in pair] == [(), ()]
    three = sequences_of([[*start, 501], [*start, 502], [*start, 503]])  # two are saved the trouble: worth it
    share_prefixes(three)
    assert num_computed(three) == len(start) + 3
    lone = sequences_of([words(1, 60), words(2, 60)])
    share_prefixes(lone)
    assert [sequence.chain for sequence in lone] == [(), ()]


def test_newcomers_continue_a_prefix_in_use() -> None:
    start = words(0, 40)
    early = sequences_of([[*start, 501], [*start, 502]])
    share_prefixes(early)
    [prefix] = early[0].chain
    late = sequences_of([[*start, 503], words(1, 20), start])  # the last would have no token of its own left
    share_prefixes(late, [prefix])
    assert late[0].chain == (prefix,)
    assert prefix.num_users == 3
    assert late[1].chain == late[2].chain == ()


def test_a_forgotten_prefix_is_as_before_it_was_computed() -> None:
    prefix = Prefix(tokens=[1, 2], scored=True, cached=2, prompt_logprobs=[-1.0], prompt_greedy=[True], is_finite=False)
    prefix.next_logprobs, prefix.next_greedy = [-2.0, -3.0], 0
    prefix.forget()
    assert vars(prefix) == vars(Prefix(tokens=[1, 2], scored=True))


def test_many_prompts_are_quick() -> None:
    """A whole MMLU-like suite of 5000 prompts of 500 tokens takes seconds, not minutes."""
    subjects = [words(subject, 450) for subject in range(57)]
    prompts = [[*subjects[i % 57], *words(i, 50)] for i in range(5_000)]
    sequences = sequences_of(prompts)
    share_prefixes(sequences)
    assert num_computed(sequences) <= 57 * 450 + 5_000 * 50


@dataclass
class Block:
    """Room in a cache that counts."""

    num_rows: int
    tier: str = "device"
    first: int = 0


@dataclass
class Cache:
    """A cache room of a given size on the device."""

    room: int

    refusal: str | None = None

    def allocate(self, num_rows: int, *, with_state: bool = True) -> Any:
        """A block, while there is room."""
        if num_rows > self.room:
            return None
        self.room -= num_rows
        return Block(num_rows)

    def free(self, block: Any) -> None:
        """Give room back."""
        self.room += block.num_rows

    def free_state(self, block: Any) -> Any:
        """There are no states."""
        return block

    def expect(self, sizes: object) -> None:
        """Be told of what comes."""

    def num_off_device(self, num_rows: int) -> int:
        """Nothing lies off the device."""
        return 0


def compute(scheduler: Scheduler, batches: list[list[Segment]]) -> int:
    """What an executor and an engine do after a sweep; all sequences end with it. Returns the rows computed."""
    for segment in (segment for batch in batches for segment in batch):
        segment.span.cached += segment.num_rows
    scheduler.finish(list(scheduler.running))
    return sum(segment.num_rows for batch in batches for segment in batch)


def test_prompts_that_grow_step_by_step_nest_as_deep_as_they_are_many() -> None:
    """1,200 prompts, each the one before it and 16 tokens more, as of an agent's steps: 1,199 prefixes in a row."""
    tokens = words(0, 1_200 * MIN_SHARED_TOKENS)
    prompts = [tokens[: size * MIN_SHARED_TOKENS] for size in range(1, 1_201)]
    cache = Cache(2 * len(tokens))
    limits = Limits(
        sequences_per_batch=400, batches=3, rows_per_batch=10**6, cached_rows_per_batch=10**6, rows_per_sweep=10**6
    )
    scheduler = Scheduler(limits, cache)
    sequences = [Sequence.of(Job(prompt=prompt, max_new_tokens=2)) for prompt in prompts]
    scheduler.add(sequences)
    assert max(len(sequence.chain) for sequence in sequences) > 1_150
    assert_consistent(sequences)
    assert [whole(sequence) for sequence in sequences[::97]] == prompts[::97]
    assert "tokens" in repr(sequences[-1])
    assert compute(scheduler, scheduler.next_sweep()) == num_computed(sequences)
    assert scheduler.is_idle
    assert cache.room == 2 * len(tokens)


def test_a_prefix_that_others_may_yet_share_keeps_its_state() -> None:
    """Only pieces of a long prompt are continued by one span for good."""
    block = blocks.Block("device", 0, 2, slot=0)
    for is_piece in (False, True):
        prefix = Prefix(tokens=[1, 2], num_users=1, block=block, is_piece=is_piece)
        behind = Sequence(job=Job(prompt=[1, 2, 3]), tokens=[3], num_prompt=1, parent=prefix, cached=1)
        assert continued_prefixes([behind]) == ([(prefix, block)] if is_piece else [])
