"""Protects: engines that gather parts of the weights from each other: the answers of one alone, in step, and faults."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import members
import pytest
from members import Case, Outcome
from parity import JOBS, POLICIES

from engine import Engine
from engine.memory.layout import part_bytes, part_of

pytestmark = pytest.mark.usefixtures("warm_processes")

SOME = JOBS[:4]


def case(model: Path, tmp_path: Path, name: str, jobs: list[Any], **others: Any) -> Case:
    settings = {**POLICIES[name], "device": "cpu", "offload-dir": str(tmp_path / "off"), **others}
    return Case(model=str(model), policy=settings, jobs=jobs, gather=True)


def numbers(outcome: Outcome) -> list[Any]:
    assert outcome.error is None
    assert [each.error for each in outcome.done] == [None] * len(outcome.done)
    return [(each.tokens, each.logprobs, each.prompt_logprobs) for each in outcome.done]


def alone(case: Case, jobs: Any = SOME) -> Outcome:
    with Engine.from_pretrained(case.model, policy=case.policy) as engine:
        return members.outcome_of(engine, jobs)


def test_members_answer_as_one_engine_does(build: Callable[[str], Path], tmp_path: Path) -> None:
    """Bit for bit: all tiers, tied and untied, encoded, lossless, packed by experts; one has nothing to compute."""
    cases = [
        case(build("llama"), tmp_path, "device", [SOME, SOME]),
        case(build("gpt2"), tmp_path, "thirds", [SOME, []]),
        case(build("qwen3-moe"), tmp_path, "thirds", [SOME, SOME], **{"compress-weight": 4}),
        case(
            build("qwen3-moe"), tmp_path, "20-80", [SOME, SOME], **{"compress-weight": "lossless", "dtype": "bfloat16"}
        ),
        case(build("llama"), tmp_path, "disk", [[], SOME], overlap=False),
    ]
    for given, outcomes in zip(cases, members.run(cases, 2, tmp_path), strict=True):
        expected = alone(given)
        for jobs, outcome in zip(given.jobs, outcomes, strict=True):
            assert numbers(outcome) == (numbers(expected) if jobs else [])
        assert [outcome.digest is None for outcome in outcomes] == [False, True]


def test_three_members_hold_a_third_each(build: Callable[[str], Path], tmp_path: Path) -> None:
    """Of the layers and the head; what is looked up and what is needed throughout stays whole."""
    given = case(build("llama"), tmp_path, "host", [SOME] * 3, **{"pin-weight": False})
    (outcomes,) = members.run([given], 3, tmp_path)
    with Engine.from_pretrained(given.model, policy=given.policy) as engine:
        placed = engine.parts.weights.placed_bytes()
        expected = members.outcome_of(engine, SOME)
        beside = expected.held["host"] - sum(tiers["host"] for tiers in placed.values())
    whole = placed["embedding"]["host"] + placed["outer"]["host"]
    split = sum(tiers["host"] for tiers in placed.values()) - whole
    for outcome in outcomes:
        assert numbers(outcome) == numbers(expected)
        assert outcome.held["host"] - beside == pytest.approx(whole + split / 3, abs=len(placed) * 512 * 3)


OUT_OF_MEMORY = """
import torch
from engine.executor import Executor
from engine.model.causal_model import CausalModel
answer, layer = Executor._answer, CausalModel.layer
def fail_behind_the_last_layer(self, batches):
    if sys.argv[-1] == "1" and batches and not hasattr(self, "has_failed"):
        self.has_failed = True
        raise torch.OutOfMemoryError("injected")
    return answer(self, batches)
def fail_in_a_layer(self, index, *others):
    if sys.argv[-1] == "1" and index == 1 and not hasattr(self, "has_failed"):
        self.has_failed = True
        raise torch.OutOfMemoryError("injected")
    return layer(self, index, *others)
Executor._answer, CausalModel.layer = fail_behind_the_last_layer, fail_in_a_layer
"""


def test_a_member_that_runs_out_of_memory_computes_again_beside_the_others(
    build: Callable[[str], Path], tmp_path: Path
) -> None:
    """In a layer, and behind the last one; nobody is left waiting, and answers stay right."""
    cases = [case(build("llama"), tmp_path, "20-80", [SOME, JOBS], **others) for others in ({}, {"compress-weight": 8})]
    for given, outcomes in zip(cases, members.run(cases, 2, tmp_path, before=OUT_OF_MEMORY), strict=True):
        assert numbers(outcomes[0]) == numbers(alone(given))
        assert [each.tokens for each in outcomes[1].done] == [each.tokens for each in alone(given, JOBS).done]


FAULT = """
from engine.model.causal_model import CausalModel
layer = CausalModel.layer
def fail(self, index, *others):
    if sys.argv[-1] == "1" and index == 1:
        if {dies}:
            members.os._exit(9)
        raise RuntimeError("the device has gone")
    return layer(self, index, *others)
CausalModel.layer = fail
"""


@pytest.mark.parametrize("dies", [True, False])
def test_no_member_waits_for_one_that_has_ended(dies: bool, build: Callable[[str], Path], tmp_path: Path) -> None:
    given = case(build("llama"), tmp_path, "20-80", [SOME, SOME])
    (outcomes,) = members.run([given], 2, tmp_path, before=FAULT.format(dies=dies), may_die=True)
    assert outcomes[0].error is not None
    assert "one of the 2 engines that share the weights has ended" in outcomes[0].error


def test_what_needs_whole_weights_is_refused(build: Callable[[str], Path], tmp_path: Path) -> None:
    program = f"""
import sys; sys.path[:0] = {[str(Path(members.__file__).parent), str(Path(members.__file__).parents[2])]}
import members
from engine.errors import UnsupportedError
case = members.Case(model={str(build("llama"))!r}, policy={{"device": "cpu"}}, jobs=[], gather=True)
with members.opened(case, 0, 1, 0, members.Path({str(tmp_path / "meeting")!r})) as engine:
    engine.wait_until_loaded()
    try:
        engine.compare_with_stock([], [])
    except UnsupportedError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert "open the model on one device" in done.stdout, done.stderr


@pytest.mark.parametrize("num_bytes", [0, 1, 511, 512, 513, 1024, 100_000])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_cover_a_unit(num_bytes: int, count: int) -> None:
    """Side by side, in order, each from a place in the slot that the other members reckon with."""
    parts = [part_of(num_bytes, index, count) for index in range(count)]
    covered = [byte for part in parts for byte in range(part.first, part.end)]
    assert covered == list(range(num_bytes))
    size = part_bytes(num_bytes, count)
    assert all(part.first in (index * size, num_bytes) for index, part in enumerate(parts))
    assert count * size >= num_bytes
