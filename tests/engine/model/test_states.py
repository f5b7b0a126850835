"""Protects: what layers keep of a sequence besides keys and values is its own; what is not known is refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import parity
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv
from watch import Watch

from engine import Engine, Job
from engine.cache.joint_room import JointRoom
from engine.cache.tables import Tables
from engine.errors import UnsupportedError
from engine.memory.arena import Arena
from engine.memory.disk.rows import DiskRows
from engine.memory.tiers import TIERS, Tier
from engine.model.causal_model import CausalModel
from engine.schedule.block import Block
from flexgen_helm.checking.random_model import save_small

Build = Callable[[str], Path]
Reference = Callable[[str], PreTrainedModel]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def few_at_once(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Two micro-batches of two sequences, on all tiers: others join where some have left."""
    policy = {**parity.POLICIES["small"], "device": "cpu", "offload-dir": str(tmp_path_factory.mktemp("offload"))}
    policy["percent"] = [34, 33, 34, 33, 34, 33]
    with Engine.from_pretrained(str(build("qwen3-next")), policy=policy) as engine:
        yield engine


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    prompts=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 40), st.integers(0, 6)), min_size=2, max_size=9),
    seed=st.integers(0, 9),
)
def test_a_state_never_reaches_another_sequence(
    prompts: list[tuple[int, int, int]], seed: int, few_at_once: Engine, reference: Reference
) -> None:
    """Whatever runs beside it: every log-probability is that of plain transformers, which computes each text alone."""
    words = random.Random(seed)
    shared = [words.randrange(3, 490) for _ in range(60)]
    jobs = [
        Job(
            # Nested prefixes of 0, 18, 36 and 54 tokens, and tokens of their own.
            prompt=[*shared[: 18 * min(nested, 3)], *(words.randrange(3, 490) for _ in range(own))],
            max_new_tokens=new,
            prompt_logprobs=new % 2 == 0,
        )
        for nested, own, new in prompts
    ]
    model = reference("qwen3-next")
    for job, completion in zip(jobs, few_at_once.run(jobs), strict=True):
        assert completion.error is None
        oracle = models.reference_logprobs(model, [*job.prompt, *completion.tokens])
        found = [*(completion.prompt_logprobs or [None])[1:], *completion.logprobs]
        assert found == pytest.approx(oracle[len(oracle) - len(found) :], abs=1e-4)


def test_a_state_that_a_failed_sweep_has_changed_is_computed_anew(
    build: Build, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep runs out of memory at its last layer, in decode steps: the layers before have taken a token on."""
    expected = parity.expect(reference("qwen3-next"))
    with Engine.from_pretrained(str(build("qwen3-next")), policy={"device": "cpu"}) as engine:
        layer, failed = engine.parts.model.layer, []

        def run(index: int, hidden: torch.Tensor, call: Any) -> torch.Tensor:
            decodes = engine.parts.model.sweeping.batch.segments[0].is_decode
            if index == 2 and decodes and len(failed) < 2:
                failed.append(index)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return layer(index, hidden, call)

        monkeypatch.setattr(engine.parts.model, "layer", run)
        done = engine.run(parity.JOBS)
        assert len(failed) == 2
        assert engine.parts.lanes[0].scheduler.limits.most_states < engine.plan.limits.most_states
    assert parity.differences(expected, done)[0] == []


def test_a_prompt_in_pieces_needs_one_state_where_a_sweep_ran_out_of_memory(
    build: Build, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is enough for 64 rows at once, and for three states: of what two prompts share, and of each of them."""
    words = random.Random(5)
    shared, *own = ([words.randrange(3, 490) for _ in range(count)] for count in (70, 45, 50))
    jobs = [Job(prompt=[*shared, *each], max_new_tokens=3, prompt_logprobs=True) for each in own]
    with Engine.from_pretrained(str(build("qwen3-next")), policy={"device": "cpu"}) as engine:
        layer, slots, rows = engine.parts.model.layer, engine.parts.lanes[0].states.room, list[int]()
        allocate = slots.allocate_on

        def run(index: int, hidden: torch.Tensor, call: Any) -> torch.Tensor:
            if index == 2 and len(hidden) > 64:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            rows.append(len(hidden) if index == 2 else 0)
            return layer(index, hidden, call)

        def allocated(tier: Tier, num_slots: int) -> Block | None:
            return None if sum(slots.num_blocks.values()) == 3 else allocate(tier, num_slots)

        monkeypatch.setattr(engine.parts.model, "layer", run)
        monkeypatch.setattr(slots, "allocate_on", allocated)
        done = engine.run(jobs)
        assert set(slots.num_blocks.values()) == {0}
    assert sum(rows) == 70 + 45 + 50 + 2 * 2
    for job, completion in zip(jobs, done, strict=True):
        assert completion.error is None
        oracle = models.reference_logprobs(reference("qwen3-next"), [*job.prompt, *completion.tokens])
        assert [*(completion.prompt_logprobs or ())[1:], *completion.logprobs] == pytest.approx(oracle, abs=1e-4)


def test_hidden_states_are_as_wide_as_the_family_adds_them_up(build: Build) -> None:
    """Those of Mamba are float32 in every dtype: on the host they would otherwise be rounded after each layer."""
    found = []
    for activations in ("gpu", "cpu"):
        policy = {"device": "cpu", "dtype": "bfloat16", "activations": {"gpu": 0, "cpu": 0, activations: 100}}
        with Engine.from_pretrained(str(build("mamba2")), policy=policy) as engine:
            found.append(engine.run(parity.JOBS[:4]))
    assert [each.logprobs for each in found[0]] == [each.logprobs for each in found[1]]


def test_states_of_prefixes_are_held_until_those_behind_have_begun(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five pairs, each with a prefix of its own, in one sweep, of which a micro-batch may have two."""
    rng = random.Random(3)
    starts = [[rng.randrange(3, 490) for _ in range(20)] for _ in range(5)]
    jobs = [Job(prompt=[*start, at], max_new_tokens=2) for start in starts for at in (3, 4)]
    with Engine.from_pretrained(str(build("qwen3-next")), policy={"device": "cpu"}) as engine:
        scheduler, states = engine.parts.lanes[0].scheduler, engine.parts.lanes[0].states
        scheduler.limits = engine.parts.lanes[0].executor.limits = replace(scheduler.limits, most_states=2)
        write, held = states.write, list[int]()

        def writing(*args: Any) -> None:
            write(*args)
            held.append(len(states._fresh))

        monkeypatch.setattr(states, "write", writing)
        watch = Watch(engine)
        done = engine.run(jobs)
    assert [each.error for each in done] == [None] * 10
    assert watch.tokens[0] == 5 * 20 + 10
    assert max(held) == 2
    assert held[-1] == 0


def test_what_begins_at_nought_behind_a_state_shares_no_prefix(tmp_path: Path) -> None:
    """The selective scan of stock code takes no state for several tokens: prompts are computed whole."""
    directory = save_small(tmp_path / "model", models.small_config_of("mamba"))
    start = [5 + 3 * at for at in range(40)]
    jobs = [Job(prompt=[*start, 7 * at + 3], max_new_tokens=4) for at in range(3)]
    with Engine.from_pretrained(str(directory), policy={"device": "cpu"}) as engine:
        assert not engine.parts.model.continues
        watch = Watch(engine)
        done = engine.run(jobs)
    assert watch.tokens[0] == 3 * 41
    model = models.load_reference(directory)
    for job, completion in zip(jobs, done, strict=True):
        oracle = models.reference_logprobs(model, [*job.prompt, *completion.tokens])[len(job.prompt) - 1 :]
        assert completion.logprobs == pytest.approx(oracle, abs=1e-4)


def test_stock_code_that_mixes_sequences_or_loses_states_is_refused(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = Lfm2ShortConv.forward

    def mixing(self: Any, hidden_states: torch.Tensor, cache: Any = None, **others: Any) -> Any:
        return stock(self, hidden_states + hidden_states.mean(0, keepdim=True), cache=cache, **others)

    def losing(self: Any, hidden_states: torch.Tensor, cache: Any = None, **others: Any) -> Any:
        found = stock(self, hidden_states, cache=cache, **others)
        cache.layers[0].conv_states[0] = torch.zeros_like(cache.layers[0].conv_states[0])
        return found

    for forward, words in ((mixing, "mixes sequences"), (losing, "something else for a token after a state")):
        monkeypatch.setattr(Lfm2ShortConv, "forward", forward)
        with pytest.raises(UnsupportedError, match=f"its Lfm2ShortConv.*{words}"):
            CausalModel(build("lfm2"), torch.float32, CPU)


def joint_room(budgets: dict[Tier, int], row_bytes: int, slot_bytes: int) -> tuple[JointRoom, Tables, Tables]:
    arena = Arena(CPU)

    def tables(size: int) -> Tables:
        sizes = {tier: [size] for tier in TIERS}
        return Tables(sizes, dict.fromkeys(TIERS, torch.uint8), arena, budgets, None, DiskRows(arena, [size]), list)

    rows, slots = tables(row_bytes), tables(slot_bytes)
    return JointRoom(rows, slots), rows, slots


def test_rows_and_slots_of_a_span_are_on_one_tier_within_one_budget() -> None:
    """Device: 100 bytes, host: 60; a token takes 2, a state 10."""
    budgets = dict[Tier, int](device=100, host=60, disk=0)
    room, rows, slots = joint_room(budgets, 2, 10)
    room.expect([4] * 50)  # more than there is
    found = []
    while (block := room.allocate(5)) is not None:  # 20 bytes
        found.append(block)
        assert all(rows.taken(tier) + slots.taken(tier) <= budgets[tier] for tier in TIERS)
    assert [block.tier for block in found] == ["device"] * 5 + ["host"] * 3
    assert {(block.tier, block.slot) for block in found} == {
        *(("device", at) for at in range(5)),
        *(("host", at) for at in range(3)),
    }
    for block in found:
        room.free(block)
    assert set(rows.num_blocks.values()) == set(slots.num_blocks.values()) == {0}
    assert [room.allocate(5) is not None for _ in range(9)] == [True] * 8 + [False]


def test_rows_whose_state_nobody_continues_stay_where_they_are() -> None:
    """Of a prompt in pieces: the device's only slot is free again, and its rows are seen as long as the prompt runs."""
    room, rows, _ = joint_room({"device": 20, "host": 60, "disk": 0}, 2, 10)
    piece = room.allocate(5)
    assert piece is not None
    assert piece.tier == "device"
    rows.by_tier["device"][0][piece.first : piece.first + 5] = 7
    piece = room.free_state(piece)
    behind = room.allocate(9)  # more than the device has beside those rows
    assert behind is not None
    assert behind.tier == "host"
    room.expect([5] * 20)
    assert rows.by_tier["device"][0][piece.first : piece.first + 5].eq(7).all()
    room.free(piece)
    assert set(rows.num_blocks.values()) == {0, 1}


def test_spans_without_rows_have_room_where_their_states_have() -> None:
    """A model without attention: its rows take nothing, and would lie on a disk of no bytes, too."""
    room, _, _ = joint_room({"device": 35, "host": 0, "disk": 0}, 0, 10)
    found = [room.allocate(5) for _ in range(4)]
    assert [block and block.tier for block in found] == ["device"] * 3 + [None]


def test_neither_kind_keeps_what_the_other_lacks() -> None:
    """60 bytes: six states of 10 with no more than a row of 2 each, or one with 25 rows, in any order."""
    room, rows, slots = joint_room({"device": 60, "host": 0, "disk": 0}, 2, 10)
    for num_rows, count in ((1, 5), (25, 1), (1, 5), (25, 1)):
        room.expect([num_rows] * count)
        found = [room.allocate(num_rows) for _ in range(count)]
        assert None not in found
        assert rows.taken("device") + slots.taken("device") <= 60
        for block in found:
            assert block is not None
            room.free(block)
