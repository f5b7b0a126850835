"""Protects: weights, KV cache and activations really lie where the policy says, within budgets, and nothing stays."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import models
import parity
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from watch import Watch, cache_of

from engine import Engine, Job
from engine.batch.rows import Rows
from engine.cache.hidden import HiddenStates
from engine.cache.key_value import KVCache
from engine.cache.shape import KVShape
from engine.errors import CapacityError, CheckpointError, ConfigError
from engine.memory.arena import Arena
from engine.memory.tiers import TIERS, Tier
from engine.policy import Share
from engine.schedule.segment import Segment
from engine.schedule.sequence import Sequence

PERCENTS = {
    "device": [100, 0, 100, 0, 100, 0],
    "20-80": [20, 80, 0, 100, 0, 100],
    "host": [0, 100, 0, 100, 0, 100],
    "disk": [0, 0, 0, 0, 0, 0],
    "thirds": [34, 33, 34, 33, 34, 33],
    "odd": [13, 58, 71, 9, 5, 50],
}
JOBS = [Job(prompt=[*range(10, 30 + i)], max_new_tokens=6) for i in range(23)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """A model with layers of half a megabyte, so that 1 % of one is more than a few rows; tied or not."""
    built: dict[bool, Path] = {}

    def of(tied: bool) -> Path:
        if tied not in built:
            directory = tmp_path_factory.mktemp("wide")
            changes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "tie_word_embeddings": tied}
            built[tied] = models.save_model(directory, "qwen3", **changes)
        return built[tied]

    return of


def open_files(directory: Path) -> list[str]:
    """Open files of this process that are, or were, in `directory`."""
    found = []
    for handle in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{handle}"))
    return [name for name in found if name.startswith(f"{directory}/")]


def tiers(percent: list[int], first: int) -> dict[Tier, int]:
    """Percents by tier of one of the three kinds."""
    gpu, cpu = percent[first : first + 2]
    return {"device": gpu, "host": cpu, "disk": 100 - gpu - cpu}


def open_engine(directory: Path, offload: Path, **settings: Any) -> Engine:
    return Engine.from_pretrained(str(directory), policy={"device": "cpu", "offload-dir": str(offload), **settings})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", list(PERCENTS))
def test_every_unit_follows_the_percents(name: str, tied: bool, wide: Callable[[bool], Path], tmp_path: Path) -> None:
    expected = tiers(PERCENTS[name], 0)
    with open_engine(wide(tied), tmp_path, percent=PERCENTS[name]) as engine:
        engine.wait_until_loaded()
        units = engine.parts.weights.placed_bytes()
        layer = sum(units["layer.0"].values())
        parameters = sum(p.numel() * 4 for p in models.load_reference(wide(tied)).parameters())
        assert sum(sum(held.values()) for held in units.values()) == pytest.approx(parameters, rel=1e-3)
        assert set(units) == {"embedding", "outer", "layer.0", "layer.1", "layer.2"} | (set() if tied else {"head"})
        for held in units.values():
            total = sum(held.values())
            for tier in TIERS:
                assert abs(held[tier] - total * expected[tier] / 100) <= layer / 100
        placed = engine.placed_bytes()
        assert placed["host"] - engine.plan.read_ahead_bytes == sum(held["host"] for held in units.values())
        assert (engine.plan.read_ahead_bytes > 0) == (expected["disk"] > 0)
        assert placed["disk"] == sum(held["disk"] for held in units.values())
        slots = placed["device"] - sum(held["device"] for held in units.values())
        assert slots <= 2 * max(sum(held.values()) for held in units.values()) + sum(units["outer"].values())
        assert (slots == 0) == (expected["device"] == 100)


@pytest.mark.parametrize("family", ["llama", *parity.LATER])
@pytest.mark.parametrize("name", list(PERCENTS))
def test_cache_and_activations_follow_the_percents_to_one_sequence(
    name: str, family: str, build: Callable[[str], Path], tmp_path: Path
) -> None:
    with open_engine(build(family), tmp_path, percent=PERCENTS[name], **{"share-prefix": False}) as engine:
        cache, hidden, states = (
            cache_of(engine),
            engine.parts.lanes[0].executor._hidden,
            engine.parts.lanes[0].states.room,
        )
        watch = Watch(engine, lambda: (dict(cache.room.num_blocks), dict(hidden.num_spans)))
        engine.wait_until_loaded()
        before = engine.placed_bytes()
        engine.run(JOBS)
        blocks, spans = watch.seen[0]
        assert sum(blocks.values()) == sum(spans.values()) == len(JOBS)
        for tier in TIERS:
            assert abs(blocks[tier] - len(JOBS) * tiers(PERCENTS[name], 2)[tier] / 100) <= 1
            assert abs(spans[tier] - len(JOBS) * tiers(PERCENTS[name], 4)[tier] / 100) <= 1
        after = engine.placed_bytes()
        for tier in TIERS:  # the bytes are there too: rows of the blocks, and hidden rows off the device
            rows = cache.room._free_rows[tier].capacity
            assert (rows > 0) == (blocks[tier] > 0)
            slots = states._free_rows[tier].capacity
            assert (slots > 0) == (blocks[tier] > 0 and bool(engine.parts.model.mixers))
            taken = after[tier] - before[tier] - rows * cache.room.row_bytes[tier] - slots * states.row_bytes[tier]
            assert (taken > 0) == (tier != "device" and spans[tier] > 0)


parts = st.integers(0, 100).flatmap(lambda gpu: st.tuples(st.just(gpu), st.integers(0, 100 - gpu)))


@settings(deadline=None, max_examples=30)
@given(percent=parts, count=st.integers(1, 60))
def test_blocks_follow_the_percents_at_every_moment_of_filling(percent: tuple[int, int], count: int) -> None:
    share = Share(gpu=percent[0], cpu=percent[1], disk=100 - sum(percent))
    arena = Arena(torch.device("cpu"), offload_dir=tempfile.gettempdir())
    cache = KVCache([KVShape(1, 2, 1, 2)], torch.float32, arena, dict.fromkeys(TIERS, 10**4), share)
    held = Counter[str]()
    for number in range(1, count + 1):
        block = cache.room.allocate(2)
        assert block is not None
        held[block.tier] += 1
        for tier, part in (("device", share.gpu), ("host", share.cpu), ("disk", share.disk)):
            assert abs(held[tier] - number * part / 100) <= 1
    arena.close()


def test_without_a_cache_share_the_device_fills_first(tmp_path: Path) -> None:
    arena = Arena(torch.device("cpu"), offload_dir=str(tmp_path))
    cache = KVCache([KVShape(1, 2, 1, 2)] * 2, torch.float32, arena, {"device": 320, "host": 160, "disk": 64}, None)
    assert set(cache.room.row_bytes.values()) == {32}
    found = [block.tier if (block := cache.room.allocate(3)) else None for _ in range(6)]
    assert found == ["device"] * 3 + ["host"] + [None] * 2
    small = [block.tier if (block := cache.room.allocate(1)) else None for _ in range(6)]
    assert small == ["device", "host", "host", "disk", "disk", None]
    assert arena.num_bytes == {"device": 320, "host": 160, "disk": 64}


def test_what_of_a_cache_would_lie_off_the_device(tmp_path: Path) -> None:
    """By hand: without a share, what the device's 10 rows leave; with one, that share; at most what has room."""
    arena = Arena(torch.device("cpu"), offload_dir=str(tmp_path))
    budgets: dict[Tier, int] = {"device": 320, "host": 1600, "disk": 320}
    for share, expected in ((None, [0, 2, 42, 60]), (Share(gpu=25, cpu=75), [6, 9, 39, 60])):
        cache = KVCache([KVShape(1, 2, 1, 2)] * 2, torch.float32, arena, budgets, share)
        assert [cache.room.num_off_device(rows) for rows in (8, 12, 52, 500)] == expected
    arena.close()


@pytest.mark.parametrize("percent", [None, PERCENTS["20-80"], PERCENTS["thirds"], [50, 0, 100, 0, 100, 0]])
def test_what_is_placed_stays_within_the_limits(
    percent: list[int] | None, wide: Callable[[bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many long sequences, few bytes: the cache grows to its budget and not beyond, and everybody is served.

    On the CPU the device tier is a part of host memory, and cpu-memory holds for both together.
    """
    peaks: Counter[str] = Counter()
    empty = Arena.empty

    def note(arena: Arena, num_bytes: int, tier: Tier) -> torch.Tensor:
        tensor = empty(arena, num_bytes, tier)
        peaks[tier] = max(peaks[tier], arena.num_bytes[tier])
        peaks["both"] = max(peaks["both"], arena.num_bytes["device"] + arena.num_bytes["host"])
        return tensor

    monkeypatch.setattr(Arena, "empty", note)
    limits = {"gpu-memory": "12MB", "cpu-memory": "21MB"}
    shares = {} if percent is None else {"percent": percent}
    jobs = [Job(prompt=[3 + i, *range(10, 100)], max_new_tokens=20) for i in range(40)]
    with open_engine(wide(False), tmp_path, **limits, **shares) as engine:
        done = engine.run(jobs)
        assert [completion.error for completion in done] == [None] * len(jobs)
    assert peaks["device"] <= 12e6
    assert peaks["both"] <= 21e6


@pytest.mark.parametrize("name", ["device", "host", "disk", "thirds"])
def test_files_have_no_names_and_nothing_is_left_after_close(
    name: str, build: Callable[[str], Path], tmp_path: Path
) -> None:
    offload = tmp_path / "not" / "yet" / "there"
    engine = open_engine(build("llama"), offload, percent=PERCENTS[name])
    stream = engine.stream(JOBS)
    next(stream)
    uses_disk = name in ("disk", "thirds")
    assert (engine.placed_bytes()["disk"] > 0) == uses_disk
    assert bool(open_files(offload)) == uses_disk
    assert not offload.exists() or list(offload.iterdir()) == []
    list(stream)
    engine.close()
    assert engine.placed_bytes() == {"device": 0, "host": 0, "disk": 0}
    assert open_files(offload) == []  # though the engine itself is still referred to
    assert not offload.exists() or list(offload.iterdir()) == []


def test_nothing_is_left_when_loading_fails(build: Callable[[str], Path], tmp_path: Path) -> None:
    offload, broken = tmp_path / "offload", tmp_path / "broken"
    broken.mkdir()
    for file in build("llama").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = broken / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 128', '"intermediate_size": 96'))
    with pytest.raises(CheckpointError) as caught:
        open_engine(broken, offload, percent=PERCENTS["disk"])
    assert caught.tb  # whose frames hold what was half made
    assert open_files(offload) == []
    assert list(offload.iterdir()) == []


def test_nothing_is_left_when_the_disk_is_full(build: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match=r"offload-dir"):
        Arena(torch.device("cpu"), offload_dir=str(tmp_path)).file(1 << 60)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="offload-dir"):
        Arena(torch.device("cpu")).file(10)


def test_an_offload_dir_that_cannot_be_made_is_named(build: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="not writable") as caught:
        open_engine(build("llama"), file / "below", percent=PERCENTS["disk"])
    assert str(file / "below") in str(caught.value)


def test_hidden_states_of_a_larger_sweep_have_room() -> None:
    """What is put for a micro-batch is taken again, in sweeps of growing and of shrinking size."""
    arena = Arena(torch.device("cpu"))
    hidden = HiddenStates(arena, Share(gpu=0, cpu=100), 8, torch.float32)
    for sizes in ((2,), (3, 40), (5, 1, 60), (4,)):
        batches = [Rows([Segment(Sequence.of(Job(prompt=[1] * size)), size)], torch.device("cpu")) for size in sizes]
        hidden.begin(batches)
        states = [torch.randn(size, 8) for size in sizes]
        for index, each in enumerate(states):
            hidden.put(index, each)
        for index, each in enumerate(states):
            assert hidden.take(index).equal(each)
    assert arena.num_bytes["host"] == (5 + 1 + 60) * 8 * 4
    hidden.close()
    arena.close()
    assert arena.num_bytes["host"] == 0
