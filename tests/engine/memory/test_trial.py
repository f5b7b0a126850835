"""Protects: memory that grows is tried to its end, and no machine without such memory is filled by the trial."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from real_groups import made_group, run_in

from engine.memory import trial
from engine.memory.trial import Seen, look, take, try_memory

MIB, GIB = 2**20, 2**30


@dataclass
class Kernel:
    """A machine that shows `total` bytes, and takes more of those present into use when less than `low` are free."""

    total: int
    present: int
    low: int
    others: int = GIB
    """Bytes of other processes, which cannot be taken back."""
    reserved: int = 100 * MIB
    """Free, but not available: the watermarks."""
    section: int = 128 * MIB
    swap: int = 0
    held: int = 0

    def hold(self, num_bytes: int) -> None:
        self.held += num_bytes
        while self.free < self.low and self.total < self.present:
            self.total = min(self.present, self.total + self.section)
        if self.free < self.reserved:
            moved = min(self.swap, self.reserved - self.free)
            self.swap, self.others = self.swap - moved, self.others - moved
        assert self.free >= self.reserved, "others suffer"

    @property
    def free(self) -> int:
        return self.total - self.others - self.held

    def look(self) -> Seen:
        return Seen(total=self.total, available=max(0, self.free - self.reserved), free_swap=self.swap)


def reached(kernel: Kernel, most: int) -> tuple[int, int]:
    last = [*take(most, kernel.look, kernel.hold)][-1]
    assert (last.taken, last.total) == (kernel.held, kernel.total)
    return last.taken, last.total


@pytest.mark.parametrize("low", [3 * GIB, 512 * MIB])
def test_memory_that_grows_is_tried_to_its_end(low: int) -> None:
    """As a kernel's that fills its upper zone before the lowest 3 GiB."""
    taken, total = reached(Kernel(total=31 * GIB, present=126 * GIB, low=low), 128 * GIB)
    assert total == 126 * GIB
    assert 125 * GIB - 164 * MIB < taken <= 125 * GIB - 100 * MIB


@pytest.mark.parametrize("most", [1, 20 * GIB, 100 * GIB + 12345])
def test_no_more_is_taken_than_asked_for(most: int) -> None:
    taken, total = reached(Kernel(total=31 * GIB, present=126 * GIB, low=3 * GIB), most)
    assert taken == most
    assert total >= most


@pytest.mark.parametrize("others", [GIB, 7 * GIB + 1, 31 * GIB - 300 * MIB])
def test_memory_that_does_not_grow_is_left_before_it_is_full(others: int) -> None:
    taken, total = reached(Kernel(total=31 * GIB, present=31 * GIB, low=0, others=others), 128 * GIB)
    assert total == 31 * GIB
    assert 0 <= 31 * GIB - others - 100 * MIB - taken < 64 * MIB


def test_growth_that_ends_is_noticed() -> None:
    """A host that has no more to give."""
    assert reached(Kernel(total=31 * GIB, present=62 * GIB, low=3 * GIB), 128 * GIB)[1] == 62 * GIB


def test_what_others_lose_to_swap_is_no_memory() -> None:
    kernel = Kernel(total=31 * GIB, present=31 * GIB, low=0, others=4 * GIB, swap=64 * GIB)
    taken, _ = reached(kernel, 128 * GIB)
    assert taken <= 27 * GIB
    assert kernel.swap == 64 * GIB


def test_this_machine_gives_a_little_in_a_process_of_its_own() -> None:
    if not Path("/proc/meminfo").is_file():
        pytest.skip("the system does not tell of its memory")
    made = try_memory(96 * MIB)
    if made is None:
        pytest.skip("processes of this control group are ended together")
    assert made.taken == 96 * MIB
    assert abs(made.total - look().total) < GIB


def test_where_the_system_ends_all_of_a_group_nothing_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.oom.group").write_text("1\n")
    monkeypatch.setattr(trial, "group_directories", lambda controller: iter([(2, tmp_path)]))
    assert try_memory(96 * MIB) is None
    (tmp_path / "memory.oom.group").write_text("0\n")
    assert try_memory(MIB) is not None


_TRY = """
from engine.memory.trial import try_memory
made = try_memory(2 << 30)
print(json.dumps([-1 if made is None else made.taken]))
"""


def test_where_memory_runs_out_the_system_ends_the_process_that_tries() -> None:
    """A real group of 256 MiB, in which 2 GiB are tried in spite of its limit."""
    with made_group("memory", {"memory.limit_in_bytes": str(256 * MIB), "memory.max": str(256 * MIB)}) as group:
        assert run_in(group, _TRY)[0] < 256 * MIB
