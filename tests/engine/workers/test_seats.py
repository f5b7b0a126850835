"""Protects: which devices a policy means on a machine, and what is refused, with numbers, in one line."""

from __future__ import annotations

from typing import Any

import pytest

from engine import EngineError, Policy
from engine.errors import CapacityError, ConfigError, InstallationError
from engine.memory.tiers import Memory
from engine.planning.devices import Device, devices_of
from engine.workers import seats
from engine.workers.messages import Seen
from engine.workers.seats import seats_for

GB = 10**9
H200, T4 = ("NVIDIA H200", 140 * GB), ("Tesla T4", 16 * GB)


class FakeProcess:
    """A process on a machine with the given cards, of which others have taken so much."""

    def __init__(self, cards: list[tuple[str, int]], taken: dict[int, int]) -> None:
        self.devices = tuple(
            Device(name=f"cuda:{number}", model=model, num_bytes=size) for number, (model, size) in enumerate(cards)
        )
        self.taken = taken
        self.is_killed = False

    def look(self, policy: Policy) -> Seen:
        name = policy.device if isinstance(policy.device, str) else policy.device[0]
        number = int(name.partition(":")[2] or 0)
        if name.startswith("cpu") or number >= len(self.devices):
            return Seen(devices=self.devices, free=None, memory=Memory(device=GB, host=9 * GB, disk=0, shared=True))
        total = self.devices[number].num_bytes
        free = total - self.taken.get(number, 0)
        return Seen(devices=self.devices, free=(free, total), memory=Memory(device=free, host=99 * GB, disk=0))

    def kill(self) -> None:
        self.is_killed = True


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes processes of a machine; returns the list of those that were started."""

    def of(*cards: tuple[str, int], taken: dict[int, int] | None = None, cores: int = 2) -> list[FakeProcess]:
        started: list[FakeProcess] = []

        def start() -> FakeProcess:
            started.append(FakeProcess(list(cards), taken or {}))
            return started[-1]

        monkeypatch.setattr(seats, "WorkerProcess", start)
        monkeypatch.setattr(seats, "usable_cores", lambda: cores)
        return started

    return of


def devices(policy: Policy) -> list[Any]:
    return [each.device for each in seats_for(policy).policies]


@pytest.mark.parametrize(
    ("cards", "asked", "expected"),
    [
        ([], "auto", ["auto"]),
        ([], "all", ["all"]),
        ([H200], "auto", ["auto"]),
        ([H200], "all", ["cuda:0"]),
        ([H200, H200], "auto", ["cuda:0", "cuda:1"]),
        ([H200, T4, H200], "auto", ["cuda:0", "cuda:2"]),
        ([T4, H200], "auto", ["cuda:0"]),
        ([H200, H200], "all", ["cuda:0", "cuda:1"]),
        ([H200, H200], "cuda", ["cuda"]),
        ([H200, H200, H200], ("cuda:2", "cuda:0"), ["cuda:2", "cuda:0"]),
        ([H200], ("cpu:0", "cpu:1"), ["cpu:0", "cpu:1"]),
    ],
)
def test_what_is_meant(machine: Any, cards: list[Any], asked: Any, expected: list[str]) -> None:
    started = machine(*cards)
    assert devices(Policy(device=asked)) == expected
    assert not any(each.is_killed for each in started)


def test_unlike_cards_bring_all_weights_each_and_no_more_than_the_smallest_holds(machine: Any) -> None:
    machine(H200, T4)
    found = seats_for(Policy(device="all"))
    (note,) = found.notes
    assert note.startswith("cuda:0 is a NVIDIA H200 of 140.0 GB, cuda:1 a Tesla T4 of 16.0 GB: each")
    assert not found.gather
    assert found.memory is not None
    assert found.memory.device == 16 * GB


def test_like_cards_gather_unless_told_otherwise(machine: Any) -> None:
    machine(H200, H200)
    assert seats_for(Policy(device="all")).gather
    assert not seats_for(Policy(device="all", gather_weights=False)).gather
    assert not seats_for(Policy(device=("cpu:0", "cpu:1"))).gather
    assert seats_for(Policy(device=("cpu:0", "cpu:1"), gather_weights=True)).gather


def test_auto_leaves_out_a_busy_card(machine: Any) -> None:
    started = machine(H200, H200, H200, taken={1: 70 * GB})
    found = seats_for(Policy())
    assert [each.device for each in found.policies] == ["cuda:0", "cuda:2"]
    assert found.notes == ("device cuda:1 is left out: 70.0 GB of its 140.0 GB are taken by others",)
    assert [each.is_killed for each in started] == [False, True, False]


@pytest.mark.parametrize(
    ("cards", "taken", "policy", "error", "parts"),
    [
        ([], {}, Policy(device=("cuda:0", "cuda:1")), InstallationError, ["cuda:0, cuda:1", "no cuda device", "2"]),
        ([H200], {}, Policy(device=("cuda:0", "cuda:1")), InstallationError, ["cuda:1", "only 1 cuda device", "2"]),
        ([], {}, Policy(device=("cpu:1", "cpu:2")), InstallationError, ["cpu:2", "2 cores", "2"]),
        (
            [H200, T4],
            {},
            Policy(device=("cuda:0", "cuda:1"), gather_weights=True),
            ConfigError,
            ["H200", "140.0 GB", "T4", "16.0 GB", "gather-weights: false"],
        ),
        (
            [H200, H200],
            {1: 40 * GB},
            Policy(device=("cuda:0", "cuda:1")),
            CapacityError,
            ["cuda:1", "40.0 GB", "140.0 GB", "gpu-memory", "100.0 GB"],
        ),
        (
            [H200, H200],
            {0: 130 * GB},
            Policy(device="all", gpu_memory=16 * GB),
            CapacityError,
            ["cuda:0", "10.0 GB", "140.0 GB", "gpu-memory 16.0 GB"],
        ),
    ],
)
def test_what_is_refused(
    machine: Any, cards: list[Any], taken: Any, policy: Policy, error: type[EngineError], parts: list[str]
) -> None:
    started = machine(*cards, taken=taken)
    with pytest.raises(error) as raised:
        seats_for(policy)
    message = str(raised.value)
    assert all(part in message for part in parts)
    assert "\n" not in message
    assert all(each.is_killed for each in started)


def test_a_card_that_others_use_a_little_of_is_not_busy(machine: Any) -> None:
    machine(H200, H200, taken={1: GB})
    assert devices(Policy(device="all")) == ["cuda:0", "cuda:1"]


def test_a_name_is_taken_as_it_is() -> None:
    assert devices_of("cuda:7", (), 1) == ("cuda:7",)


def test_processes_that_wait_get_the_devices_in_their_order_and_no_more_are_started_or_kept(machine: Any) -> None:
    started = machine(H200, H200)
    waiting = seats_for(Policy()).processes
    assert seats_for(Policy()).processes != waiting
    assert len(started) == 4
    assert seats_for(Policy(), waiting).processes == waiting
    assert len(started) == 4
    assert seats_for(Policy(device="cuda:1"), waiting).processes == waiting[:1]
    assert [each.is_killed for each in waiting] == [False, True]
