"""Protects: forwards that wait for each other's experts get the rows they asked for, and none is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import nn

from engine.model.experts.joint import JointExperts
from engine.model.sweep_context import SweepContext

CPU = torch.device("cpu")
Log = list[tuple[str, int]]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def joint_of(log: Log) -> tuple[SweepContext, JointExperts]:
    """Experts that add each row's weight and the index of its expert, and note how many rows they are asked at once."""
    context = SweepContext()

    def experts(module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        log.append((type(module).__name__, len(hidden)))
        assert threading.current_thread() is threading.main_thread()
        return hidden + index + weights

    return context, JointExperts(context, experts, CPU)


def forward(
    context: SweepContext, found: dict[int, torch.Tensor], log: Log, number: int, modules: list[nn.Module]
) -> None:
    """Asks one module after the other, of `number + 1` rows."""
    context.batch = number  # type: ignore[assignment]
    states = torch.full((number + 1, 1), float(number))
    log.append(("begins", number))
    for module in modules:
        assert context.ask_experts is not None
        given = (torch.full((number + 1, 1), value) for value in (10 * number, 100 * number))
        states = context.ask_experts(module, states, *given)
        assert context.batch == number
    assert not torch.is_grad_enabled()
    log.append(("ends", number))
    found[number] = states


def test_all_ask_before_any_goes_on() -> None:
    log: Log = []
    found: dict[int, torch.Tensor] = {}
    context, joint = joint_of(log)
    first, second = nn.Linear(1, 1), nn.Identity()
    asked = [[first], [], [first, second], [second]]
    joint.run([partial(forward, context, found, log, number, modules) for number, modules in enumerate(asked)])
    assert {number: states.flatten().tolist() for number, states in found.items()} == {
        number: [number + 110.0 * number * len(modules)] * (number + 1) for number, modules in enumerate(asked)
    }
    assert log == [
        *[("begins", 0), ("begins", 1), ("ends", 1), ("begins", 2), ("begins", 3)],
        *[("Linear", 1 + 3), ("Identity", 4), ("ends", 0), ("ends", 3), ("Identity", 3), ("ends", 2)],
    ]
    assert context.ask_experts is None


def test_one_call_needs_no_thread() -> None:
    context, joint = joint_of([])
    threads = []
    joint.run([lambda: threads.append((threading.current_thread(), context.ask_experts))])
    assert threads == [(threading.main_thread(), None)]


@pytest.mark.parametrize("when", ["before", "behind"])
def test_an_error_ends_all(when: str) -> None:
    """And is raised as it is; those that wait let go of what they hold."""
    log: Log = []
    found: dict[int, torch.Tensor] = {}
    context, joint = joint_of(log)
    modules: list[nn.Module] = [nn.Identity()]

    def fails() -> None:
        if when == "behind":
            forward(context, found, log, 1, modules)
        raise torch.OutOfMemoryError("no room")

    calls: list[Callable[[], None]] = [partial(forward, context, found, log, number, modules) for number in (0, 2)]
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        joint.run([calls[0], fails, calls[1]])
    assert context.ask_experts is None
    assert [*found] == ([] if when == "before" else [0, 1])
    found.clear()
    joint.run(calls)
    assert [*found] == [0, 2]
