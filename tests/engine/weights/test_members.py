"""Protects: engines that share weights: the answers of one alone, one copy in host memory, faults of each of them."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import members
import pytest
from members import MEMORY
from parity import JOBS, POLICIES

from engine import Engine, EngineError
from engine.errors import CapacityError, CheckpointError
from engine.member import Member
from engine.weights.members.host_weights import HostWeights
from engine.weights.store import WeightStore

SOME = JOBS[:4]


@pytest.fixture
def handle() -> Iterator[int]:
    """Shared memory, empty at first."""
    handle = os.memfd_create("weights")
    yield handle
    os.close(handle)


def policy(tmp_path: Path, name: str, **others: Any) -> dict[str, Any]:
    return {**POLICIES[name], "device": "cpu", "offload-dir": str(tmp_path / "off"), **others}


def member(index: int, handle: int, count: int = 2, **others: Any) -> Member:
    return Member(index=index, count=count, gather=False, weights=handle, meeting=None, **{"memory": MEMORY, **others})


def numbers(engine: Engine, jobs: Any = SOME) -> list[Any]:
    done = engine.run(jobs)
    assert [each.error for each in done] == [None] * len(jobs)
    return [(each.tokens, each.logprobs, each.prompt_logprobs) for each in done]


def alone(model: Path, settings: dict[str, Any]) -> list[Any]:
    with Engine.from_pretrained(str(model), policy=settings) as engine:
        return numbers(engine)


CASES = [
    ("llama", "device", 2, {}),
    ("llama", "thirds", 3, {}),
    ("gpt2", "thirds", 2, {}),  # a tied head
    ("qwen3-moe", "20-80", 2, {"compress-weight": 4}),
    ("llama", "disk", 2, {}),
    ("opt", "host", 2, {"overlap": False}),
]


@pytest.mark.parametrize(("family", "name", "count", "others"), CASES)
def test_members_answer_as_one_engine_does(
    family: str,
    name: str,
    count: int,
    others: dict[str, Any],
    build: Callable[[str], Path],
    tmp_path: Path,
    handle: int,
) -> None:
    """Bit for bit; the first one digests the files."""
    model, settings = build(family), policy(tmp_path, name, **others)
    expected = alone(model, settings)
    with ExitStack() as stack:
        engines = [
            stack.enter_context(
                Engine.from_pretrained(str(model), policy=settings, member=member(index, handle, count))
            )
            for index in range(count)
        ]
        assert [numbers(engine) for engine in engines] == [expected] * count
        digests = [engine.weights_digest() for engine in engines]
    assert digests[0] is not None
    assert digests[1:] == [None] * (count - 1)


@pytest.mark.usefixtures("warm_processes")
def test_processes_share_one_copy(build: Callable[[str], Path], tmp_path: Path) -> None:
    settings = policy(tmp_path, "thirds")
    expected = alone(build("llama"), settings)
    case = members.Case(model=str(build("llama")), policy=settings, jobs=[SOME, SOME])
    (outcomes,) = members.run([case], 2, tmp_path)
    for outcome in outcomes:
        assert outcome.error is None
        assert [(each.tokens, each.logprobs, each.prompt_logprobs) for each in outcome.done] == expected


def test_what_lies_in_host_memory_lies_there_once(build: Callable[[str], Path], tmp_path: Path, handle: int) -> None:
    """In pages of the shared memory: about what the weights are, however many members there are."""
    model, settings = build("llama"), policy(tmp_path, "host")
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    for count in (2, 3):
        shared = os.memfd_create("more")
        with ExitStack() as stack:
            for index in range(count):
                engine = Engine.from_pretrained(str(model), policy=settings, member=member(index, shared, count))
                stack.enter_context(engine)
                numbers(engine, SOME[:1])
            assert size * 0.95 < os.fstat(shared).st_blocks * 512 < size * 1.05 + 16 * 4096
        os.close(shared)


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of parameters, or units, that any engine put in place."""
    seen: list[str] = []
    put = WeightStore.put

    def note(self: WeightStore, name: str, *args: Any, **others: Any) -> None:
        seen.append(name)
        put(self, name, *args, **others)

    monkeypatch.setattr(WeightStore, "put", note)
    return seen


def test_members_deal_units_out_among_themselves(
    build: Callable[[str], Path], tmp_path: Path, handle: int, puts: list[str]
) -> None:
    """Together they put every parameter once."""
    model, settings = build("llama"), policy(tmp_path, "host")
    with (
        Engine.from_pretrained(str(model), policy=settings, member=member(0, handle)) as first,
        Engine.from_pretrained(str(model), policy=settings, member=member(1, handle)) as second,
    ):
        first.wait_until_loaded()
        second.wait_until_loaded()
        names = {name for unit in first.parts.model.units for name in unit.owners}
    assert sorted(puts) == sorted(names)


def test_a_member_that_is_started_again_finds_what_is_in_place(
    build: Callable[[str], Path], tmp_path: Path, handle: int, puts: list[str]
) -> None:
    model, settings = build("llama"), policy(tmp_path, "host")
    expected = alone(model, settings)
    with Engine.from_pretrained(str(model), policy=settings, member=member(0, handle)) as other:
        other.wait_until_loaded()  # all of it: nobody else comes
        puts.clear()
        with Engine.from_pretrained(str(model), policy=settings, member=member(1, handle)) as engine:
            assert numbers(engine) == expected
    assert puts == []


def test_what_a_member_left_half_done_is_put_again(build: Callable[[str], Path], tmp_path: Path, handle: int) -> None:
    """Its lock has gone with it, and the unit is not complete."""
    model, settings = build("llama"), policy(tmp_path, "host")
    expected = alone(model, settings)
    with Engine.from_pretrained(str(model), policy=settings, member=member(0, handle)) as first:
        numbers(first)
        sizes = {
            name: sum(end - begin for _, begin, end in placed.tiers())
            for name, placed in first.parts.weights.placed.items()
        }
    os.ftruncate(handle, 0)
    ended = HostWeights(member(1, handle), sizes)
    assert ended.begin("layer.0", of_others=True)
    ended.claim("layer.0").fill_(7)
    with Engine.from_pretrained(str(model), policy=settings, member=member(0, handle)) as engine:
        pending = engine.sweeps(SOME)
        assert not ended.is_complete("layer.0")  # nobody else may put it yet
        ended.close()
        found = {index: done for finished in pending for index, done in finished}
    assert [(found[i].tokens, found[i].logprobs, found[i].prompt_logprobs) for i in range(len(SOME))] == expected


def test_a_fault_that_all_would_meet_reaches_all(
    build: Callable[[str], Path], tmp_path: Path, handle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = WeightStore.put

    def fail(self: WeightStore, name: str, *args: Any, **others: Any) -> None:
        if self.member is not None and self.member.index == 1 and self.needs(name) and ".1." in name:
            raise CheckpointError(f"{name} cannot be read")
        put(self, name, *args, **others)

    monkeypatch.setattr(WeightStore, "put", fail)
    model, settings = build("llama"), policy(tmp_path, "thirds")
    with (
        Engine.from_pretrained(str(model), policy=settings, member=member(1, handle)) as second,
        Engine.from_pretrained(str(model), policy=settings, member=member(0, handle)) as first,
    ):
        for engine in (second, first):
            with pytest.raises(CheckpointError, match=r"\.1\..* cannot be read"):
                engine.run(SOME)


def test_a_fault_of_one_member_alone_leaves_its_units_to_the_others(
    build: Callable[[str], Path], tmp_path: Path, handle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as of its device."""
    put = WeightStore.put

    def fail(self: WeightStore, name: str, *args: Any, **others: Any) -> None:
        if self.member is not None and self.member.index == 1:
            raise RuntimeError("the device has gone")
        put(self, name, *args, **others)

    model, settings = build("llama"), policy(tmp_path, "host")
    expected = alone(model, settings)
    monkeypatch.setattr(WeightStore, "put", fail)
    with Engine.from_pretrained(str(model), policy=settings, member=member(1, handle)) as second:
        with pytest.raises(EngineError, match="the device has gone"):
            second.run(SOME)
        with Engine.from_pretrained(str(model), policy=settings, member=member(0, handle)) as first:
            assert numbers(first) == expected


def test_too_little_shared_memory_is_told_with_numbers(
    build: Callable[[str], Path], tmp_path: Path, handle: int
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    settings = policy(tmp_path, "host")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
    try:
        with pytest.raises(CapacityError, match=r"cannot get 0\.\d+ GB of shared memory"):
            Engine.from_pretrained(str(build("llama")), policy=settings, member=member(0, handle))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_pages_that_the_system_does_not_give_are_an_error(
    build: Callable[[str], Path], tmp_path: Path, handle: int
) -> None:
    """And no signal that ends the process."""
    with Engine.from_pretrained(
        str(build("llama")), policy=policy(tmp_path, "host"), member=member(0, handle)
    ) as engine:
        os.ftruncate(handle, 3 * 4096)  # as if there were no memory behind the first units
        with pytest.raises(CapacityError, match="shared memory"):
            engine.run(SOME)


def test_members_of_different_plans_do_not_share(build: Callable[[str], Path], tmp_path: Path, handle: int) -> None:
    model = str(build("llama"))
    with Engine.from_pretrained(model, policy=policy(tmp_path, "host"), member=member(0, handle)) as first:
        first.wait_until_loaded()
        with pytest.raises(EngineError, match="different plans"):
            Engine.from_pretrained(model, policy=policy(tmp_path, "thirds"), member=member(1, handle))
