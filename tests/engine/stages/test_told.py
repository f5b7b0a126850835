"""Protects: a stage makes of what it is told the same micro-batches as the stage that has scheduled them."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from typing import Any

import torch

from engine import Job
from engine.batch.micro_batch import MicroBatch
from engine.memory.tiers import Tier
from engine.planning.limits import Limits
from engine.schedule.block import Block
from engine.schedule.scheduler import Scheduler
from engine.schedule.segment import Segment
from engine.schedule.sequence import Sequence, Span
from engine.stages.told import Told

LIMITS = Limits(
    sequences_per_batch=6, batches=3, rows_per_batch=64, cached_rows_per_batch=512, rows_per_sweep=256, free_rows=64
)
LARGER = replace(LIMITS, rows_per_batch=512, cached_rows_per_batch=4096, waiting_rows=70, most_states=5)
"""Of which some have become smaller since."""


class Room:
    """Gives out rows of three tiers in turn, and slots."""

    refusal = None

    def __init__(self) -> None:
        self._num_rows = self._num_slots = 0

    def allocate(self, num_rows: int, *, with_state: bool = True) -> Block:
        self._num_rows, self._num_slots = self._num_rows + num_rows, self._num_slots + 1
        tiers: tuple[Tier, ...] = ("device", "host", "disk")
        return Block(tiers[self._num_slots % 3], self._num_rows, num_rows, self._num_slots)

    def free(self, block: Block) -> None:
        pass

    def free_state(self, block: Block) -> Block:
        return block

    def expect(self, sizes: Any) -> None:
        pass

    def num_off_device(self, num_rows: int) -> int:
        return 0


def seen(value: Any, spans: dict[int, int]) -> Any:
    """A value as it can be compared, with spans by the order in which they are met."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Span):
        return "span", spans.setdefault(id(value), len(spans)), value.start, value.block
    if isinstance(value, Segment):
        return [seen(getattr(value, each.name), spans) for each in fields(value) if each.name != "draft"]
    if isinstance(value, list | tuple):
        return [seen(each, spans) for each in value]
    if isinstance(value, dict):
        return {key: seen(each, spans) for key, each in value.items()}
    return [seen(vars(value), spans)] if type(value).__module__.startswith("engine.") else value


def of_batches(batches: list[list[Segment]]) -> Any:
    spans: dict[int, int] = {}
    found = []
    for batch in (MicroBatch(segments, torch.device("cpu"), LIMITS) for segments in batches):
        groups = (batch.prefill_groups, batch.decode_prefixes, batch.prefill_prefixes, batch.context_groups(None))
        found.append((seen(vars(batch), spans), seen(groups, spans)))
    return found


def test_micro_batches_are_the_same() -> None:
    dice = random.Random(3)
    shared = [dice.randrange(300) for _ in range(24)]
    jobs = [
        Job(prompt=[*shared[: 8 * (number % 4)], *(dice.randrange(300) for _ in range(5))], max_new_tokens=number % 6)
        for number in range(1, 24)
    ]
    scheduler = Scheduler(LIMITS, Room())
    scheduler.add([Sequence.of(job) for job in jobs])
    num_drafted = num_chains = 0
    for _ in range(6):
        batches = scheduler.next_sweep()
        told = Told.of(1, (7, 8, 9), (1, 2, 3), LIMITS, batches)
        read = Told.read(told.numbers())
        assert (read.lane, read.rows, read.slots) == (told.lane, told.rows, told.slots)
        assert read.within(LARGER) == LIMITS
        assert of_batches(read.batches) == of_batches(batches)
        for segment in (segment for batch in batches for segment in batch):
            num_drafted += len(segment.draft)
            num_chains += len(segment.span.chain)
            segment.span.cached += segment.num_rows - len(segment.draft)
            if isinstance(segment.span, Sequence):
                segment.span.tokens += [5, 6] * 4  # it will be drafted again
                segment.span.cached = len(segment.span.tokens) - 1
        scheduler.finish([sequence for sequence in scheduler.running if not sequence.needs_cache])
    assert num_chains > 0
    assert num_drafted > 0
