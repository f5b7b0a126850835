"""Protects: experts that are expanded some at a time compute what they do when their layer is expanded at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import companies
import models
import packers
import parity
import pytest
import torch
from parity import JOBS, POLICIES
from transformers import AutoModelForCausalLM

from engine import Completion, Engine, Job
from engine.errors import CapacityError
from engine.kernels.grouped.stack import Stack
from engine.memory.layout import Extent
from engine.model.experts.joint import JointExperts
from engine.planning.demand import Demand
from engine.planning.limits import SLOTS
from engine.weights.encoded.expansion import Expansion
from engine.weights.portion import Portion
from engine.weights.slots import Slots
from engine.weights.stored_form import shape_of
from engine.weights.stream import WeightStream

BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [8, 16]}
INT4 = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True}
MODELS: dict[str, Callable[[Path], Path]] = {
    "mxfp4": packers.save_mxfp4,
    "float8 in blocks": lambda path: packers.save_packed(path, "deepseek-v3", packers.float8_blocks(8, 16), BLOCKS),
    "int4": lambda path: packers.save_packed(path, "qwen3-moe", *packers.compressed("pack-quantized", **INT4)[:2]),
    "codes": lambda path: models.save_model(path, "qwen3-moe"),
    "lossless": lambda path: models.save_model(path, "qwen3-moe"),
}
"""Transposed with biases; with dense layers; two matrices of an expert in one parameter; `compress-weight`, twice."""
CODES: dict[str, dict[str, Any]] = {
    "codes": {"compress-weight": 4},
    "lossless": {"compress-weight": "lossless", "dtype": "bfloat16"},
}
SOME = [JOBS[0], JOBS[2], JOBS[7], JOBS[-1]]


@pytest.fixture
def some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much memory there is, and fewer experts at a time than tiny models have."""
    monkeypatch.setattr("engine.planning.demand._EXPANDED_PART", 0.0)
    monkeypatch.setattr("engine.weights.stored_form.GROUP_BYTES", 1)


@pytest.fixture
def apart(some_at_a_time: None, monkeypatch: pytest.MonkeyPatch) -> list[WeightStream]:
    """Experts pass through the slots by themselves, though there is room for their layer; streams that were made."""
    made: list[WeightStream] = []
    plain = WeightStream.__init__

    def make(self: WeightStream, *given: Any, **others: Any) -> None:
        made.append(self)
        plain(self, *given, **{**others, "experts_apart": True})

    monkeypatch.setattr(WeightStream, "__init__", make)
    return made


def settings_of(name: str, policy: str, tmp_path: Path, **others: Any) -> dict[str, Any]:
    return {**POLICIES[policy], "device": "cpu", "offload-dir": str(tmp_path / "off"), **CODES.get(name, {}), **others}


def answers(directory: Path, settings: dict[str, Any], jobs: list[Job], *, whole: bool = False) -> list[Completion]:
    with Engine.from_pretrained(str(directory), policy=settings) as engine:
        done = engine.run(jobs)
        assert engine.parts.plan.expands_whole is whole
        assert any(placed.stacks for placed in engine.parts.weights.placed.values()) is not whole
        return done


@pytest.mark.parametrize(("name", "policy"), [*zip(MODELS, ("disk", "thirds", "device", "small", "disk"), strict=True)])
def test_bits_are_those_of_the_whole_layer_wherever_it_lies(name: str, policy: str, tmp_path: Path) -> None:
    """Three experts at a time of the smallest, of which there are four."""
    directory, settings = MODELS[name](tmp_path / "model"), settings_of(name, policy, tmp_path)
    expected = answers(directory, settings, SOME, whole=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.planning.demand._EXPANDED_PART", 0.0)
        patch.setattr("engine.weights.stored_form.GROUP_BYTES", 1 << 14)
        found = answers(directory, settings, SOME)
    assert [companies.bits(each) for each in found] == [companies.bits(each) for each in expected]


@pytest.mark.parametrize("name", MODELS)
def test_bits_depend_on_no_company(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Though every micro-batch expands its own experts, and whole layers are expanded where a job is alone."""
    directory = MODELS[name](tmp_path / "model")
    settings = settings_of(name, "host", tmp_path, dtype="bfloat16", **{"batch-invariant": True})
    with Engine.from_pretrained(str(directory), policy=settings) as engine:
        expected = [companies.bits(engine.run([job])[0]) for job in SOME]
    request.getfixturevalue("some_at_a_time")
    together = answers(directory, {**settings, "gpu-batch-size": 2, "num-gpu-batches": 2}, SOME)
    assert [companies.bits(each) for each in together] == expected


@pytest.mark.usefixtures("some_at_a_time")
@pytest.mark.parametrize(("name", "policy"), [("mxfp4", "thirds"), ("float8 in blocks", "disk"), ("int4", "small")])
def test_micro_batches_that_wait_for_each_other_answer_as_transformers(
    name: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever hidden states, keys and values lie meanwhile."""
    directory = MODELS[name](tmp_path / "model")
    monkeypatch.setattr(Demand, "waiting_rows", lambda self, left, rows: 150)
    joined: list[int] = []
    answer = JointExperts._answer
    monkeypatch.setattr(JointExperts, "_answer", lambda self, asked: (joined.append(len(asked)), answer(self, asked)))
    settings = settings_of(name, policy, tmp_path, **{"gpu-batch-size": 2, "num-gpu-batches": 6})
    expected = parity.expect(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())
    with Engine.from_pretrained(str(directory), policy=settings) as engine:
        assert parity.differences(expected, engine.run(JOBS))[0] == []
    assert max(joined) > 2


@pytest.mark.usefixtures("some_at_a_time")
def test_experts_are_expanded_once_for_all_that_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in a sweep, if there is room for all; and where there is none after all, for each micro-batch."""
    taken: Counter[tuple[str, int]] = Counter()
    take = Expansion._take
    monkeypatch.setattr(
        Expansion,
        "_take",
        lambda self, extent, *others: (taken.update([(extent.name, others[-2])]), take(self, extent, *others))[1],
    )
    monkeypatch.setattr(Demand, "waiting_rows", lambda self, left, rows: 1000)
    directory = MODELS["mxfp4"](tmp_path / "model")
    settings = settings_of("mxfp4", "host", tmp_path, **{"gpu-batch-size": 1, "num-gpu-batches": 8})
    jobs = [Job(prompt=[*range(20 + number, 60)], max_new_tokens=1) for number in range(8)]
    with Engine.from_pretrained(str(directory), policy=settings) as engine:
        done = engine.run(jobs)
        assert set(taken.values()) == {1}
        taken.clear()
        answer = JointExperts._answer

        def no_room(*_: Any) -> None:
            monkeypatch.setattr(JointExperts, "_answer", answer)
            raise torch.OutOfMemoryError

        monkeypatch.setattr(JointExperts, "_answer", no_room)
        again = engine.run(jobs)
        assert max(taken.values()) > 2
        assert engine.parts.lanes[0].executor.limits.waiting_rows == 0
        assert engine.parts.lanes[0].executor.limits.rows_per_batch == engine.parts.plan.limits.rows_per_batch
    assert [each.tokens for each in again] == [each.tokens for each in done]


@pytest.mark.parametrize(("name", "policy"), [*zip(MODELS, ("disk", "thirds", "host", "small", "thirds"), strict=True)])
def test_bits_are_the_same_where_experts_pass_by_themselves(
    name: str, policy: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    directory, settings = MODELS[name](tmp_path / "model"), settings_of(name, policy, tmp_path)
    expected = answers(directory, settings, SOME, whole=True)
    request.getfixturevalue("apart")
    found = answers(directory, settings, SOME)
    assert [companies.bits(each) for each in found] == [companies.bits(each) for each in expected]


def test_experts_that_pass_by_themselves_come_once_in_a_sweep(
    apart: list[WeightStream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all micro-batches that wait for each other; and slots are as large as the largest of what passes."""
    copied: Counter[int] = Counter()
    copy = Slots._copy
    monkeypatch.setattr(
        Slots, "_copy", lambda self, portion, target: (copied.update([id(portion)]), copy(self, portion, target))
    )
    monkeypatch.setattr(Demand, "waiting_rows", lambda self, left, rows: 1000)
    directory = packers.save_mxfp4(tmp_path / "model", num_local_experts=16)
    settings = settings_of("mxfp4", "host", tmp_path, **{"gpu-batch-size": 1, "num-gpu-batches": 8})
    jobs = [Job(prompt=[*range(20 + number, 60)], max_new_tokens=1) for number in range(8)]
    with Engine.from_pretrained(str(directory), policy=settings) as engine:
        engine.run(jobs)
        config, shape = engine.parts.model.config, shape_of(engine.parts.model)
        (stream,) = apart
        settle = stream._slots._fetcher.submit  # of one thread: what a sweep's end has brought ahead is there behind it
        settle(int).result()
        copied.clear()
        engine.run(jobs)
        settle(int).result()
        assert set(copied.values()) == {1}
        assert len(copied) == config.num_hidden_layers * (1 + 2 * config.num_local_experts) + 1
        assert max(map(len, stream._slots.memories)) <= shape.apart_bytes
    assert shape.apart_bytes < max(shape.unit_bytes)


def test_few_tokens_bring_only_experts_that_were_chosen(
    apart: list[WeightStream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those that were on their way when the choice became known: no more than there are slots."""
    copied: list[Portion] = []
    copy = Slots._copy
    monkeypatch.setattr(
        Slots, "_copy", lambda self, portion, target: (copied.append(portion), copy(self, portion, target))
    )
    directory = packers.save_mxfp4(tmp_path / "model", num_local_experts=16)
    settings = settings_of("mxfp4", "host", tmp_path)
    jobs = [Job(prompt=[*range(20, 60)], max_new_tokens=4), Job(prompt=[20], max_new_tokens=6)]
    with Engine.from_pretrained(str(directory), policy=settings) as engine:
        together = engine.run(jobs)
        copied.clear()
        (done,) = engine.run(jobs[1:])
        config = engine.parts.model.config
        num_moved = sum(portion not in apart[0]._portions for portion in copied)
    assert done.tokens == together[1].tokens
    each, num_sweeps = 2 * (config.num_experts_per_tok + SLOTS), len(done.tokens)
    assert 0 < num_moved <= num_sweeps * config.num_hidden_layers * each
    assert each < 2 * config.num_local_experts / 2


@pytest.mark.parametrize(("name", "how"), [("mxfp4", "apart"), ("codes", "some_at_a_time")])
def test_stock_layers_are_compared_with_all_experts(
    name: str, how: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """And with the weight files; what was made for that is gone afterwards."""
    request.getfixturevalue(how)
    directory = MODELS[name](tmp_path / "model")
    with Engine.from_pretrained(str(directory), policy=settings_of(name, "host", tmp_path)) as engine:
        done = engine.run(SOME)
        found = engine.compare_with_stock(SOME, done)
        units = [placed for placed in engine.parts.weights.placed.values() if placed.stacks]
        owners = [placed.unit.owners[name] for placed in units for name in placed.stacks]
        held = [module._parameters[attribute] for module, attribute in owners]
        assert [companies.bits(each) for each in engine.run(SOME)] == [companies.bits(each) for each in done]
    assert found.has_compared_weights
    assert [stage.name for stage in found.stages if not stage.is_within] == []
    assert held
    assert all(each is not None and each.is_meta for each in held)


@pytest.mark.usefixtures("some_at_a_time")
def test_stock_layers_that_find_no_room_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = MODELS["mxfp4"](tmp_path / "model")

    def no_room(like: torch.Tensor, **others: Any) -> torch.Tensor:
        if like.is_meta:
            raise torch.OutOfMemoryError
        return empty_like(like, **others)

    with Engine.from_pretrained(str(directory), policy=settings_of("mxfp4", "host", tmp_path)) as engine:
        done = engine.run(SOME[:1])
        empty_like = torch.empty_like
        monkeypatch.setattr(torch, "empty_like", no_room)
        with pytest.raises(CapacityError, match=r"layer\.0: its experts .*gpu-memory"):
            engine.compare_with_stock(SOME[:1], done)


@pytest.mark.usefixtures("some_at_a_time")
def test_only_experts_that_were_chosen_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where the host knows which; one token chooses two of four."""
    taken: list[tuple[str, int]] = []
    take = Expansion._take

    def noted(self: Expansion, extent: Extent, *others: Any) -> torch.Tensor:
        taken.extend((extent.name, expert) for expert in range(*others[-2:]))
        return take(self, extent, *others)

    monkeypatch.setattr(Expansion, "_take", noted)
    directory = MODELS["int4"](tmp_path / "model")
    with Engine.from_pretrained(str(directory), policy=settings_of("int4", "host", tmp_path)) as engine:
        engine.run([Job(prompt=[20], max_new_tokens=1)])
        choices = engine.parts.model.config.num_experts_per_tok
        assert choices < engine.parts.model.config.num_experts
    names = {name for name, _ in taken}
    assert len(taken) == len(set(taken)) == choices * len(names) > 0


def test_memory_for_some_experts_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is too small for a layer of plain numbers runs it, and takes no more than was planned."""
    monkeypatch.setattr("engine.weights.stored_form.GROUP_BYTES", 1)
    sizes = {"num_local_experts": 64, "intermediate_size": 128, "hidden_size": 128, "num_hidden_layers": 2}
    directory = packers.save_mxfp4(tmp_path / "model", **sizes)
    whole = 64 * 3 * 128 * 128 * 4
    settings = {**POLICIES["host"], "device": "cpu", "gpu-memory": f"{whole // 1000}kB"}
    with Engine.from_pretrained(str(directory), policy=settings) as engine:
        done = engine.run(SOME)
        assert not engine.parts.plan.expands_whole
        placed = engine.placed_bytes()["device"]
    assert placed < whole // 2
    with Engine.from_pretrained(str(directory), policy={**settings, "gpu-memory": "2GB"}) as engine:
        assert engine.parts.plan.expands_whole
        assert [each.tokens for each in engine.run(SOME)] == [each.tokens for each in done]


@pytest.mark.parametrize(
    ("counts", "at_once", "groups"),
    [
        (None, 2, [(0, 2), (2, 4), (4, 5)]),
        (None, 9, [(0, 5)]),
        ([1, 1, 1, 1, 1], 2, [(0, 2), (2, 4), (4, 5)]),
        ([0, 3, 1, 0, 2], 9, [(1, 5)]),
        ([0, 3, 1, 1, 0], 2, [(1, 2), (2, 4)]),
        ([0, 0, 0, 0, 0], 2, []),
    ],
)
def test_each_group_of_experts_is_taken_once(
    counts: list[int] | None, at_once: int, groups: list[tuple[int, int]]
) -> None:
    numbers = torch.zeros(5, 2, 3)
    stack = Stack(numbers.shape, numbers.dtype, at_once, lambda first, end: numbers[first:end])
    assert list(stack.groups(counts)) == groups
    assert stack.mT.shape == numbers.mT.shape
