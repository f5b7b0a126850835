"""Weights in host memory that all engines of a machine read, each unit loaded by one of them."""

from __future__ import annotations

import mmap
from itertools import accumulate

import torch

from engine import errors
from engine.errors import EngineError
from engine.member import Member
from engine.memory.shared import SharedMemory

_FAULT_BYTES = 4096
_FLAGS = 8
"""The offset of the first unit's flag, after the fault and its length."""
_SEPARATOR = "\0"


class HostWeights:
    """The shared bytes of units, which of them are complete, and which member loads which.

    Every member computes the same layout: a page with the fault that ended loading, one byte per unit that is set when
    the unit is complete, and the units, each beginning on a page. Units are assigned to the members. The member that
    loads a unit holds a lock on it; if it ends before the unit is complete, another member can take over.
    """

    def __init__(self, member: Member, sizes: dict[str, int]) -> None:
        """sizes: the bytes of each unit that has any. Raises `CapacityError` if the memory exceeds a limit."""
        assert member.weights is not None
        self._member = member
        self._number = {unit: number for number, unit in enumerate(sizes)}
        begin = _FAULT_BYTES + _to_page(_FLAGS + len(sizes))
        ends = list(accumulate(map(_to_page, sizes.values()), initial=begin))
        self._ranges = {
            unit: (first, first + size) for (unit, size), first in zip(sizes.items(), ends[:-1], strict=True)
        }
        self._memory = SharedMemory(member.weights, ends[-1])
        self._fault = self._memory.claim(0, _FAULT_BYTES)
        self._flags = self._memory.claim(_FAULT_BYTES, begin)
        self._flags, self._length = self._flags[_FLAGS:], self._flags[:_FLAGS].view(torch.int64)

    def __contains__(self, unit: str) -> bool:
        """Whether a unit has shared bytes."""
        return unit in self._ranges

    def view(self, unit: str) -> torch.Tensor:
        """The shared bytes of a unit; they may be used once they are claimed."""
        first, end = self._ranges[unit]
        return self._memory.whole[first:end]

    def claim(self, unit: str) -> torch.Tensor:
        """Allocate the shared bytes of a unit permanently; raises `CapacityError` if the system has no more memory."""
        return self._memory.claim(*self._ranges[unit])

    def is_complete(self, unit: str) -> bool:
        """Whether all bytes of a unit are in place."""
        return bool(self._flags[self._number[unit]])

    def begin(self, unit: str, *, of_others: bool = False) -> bool:
        """Whether this member is to load a unit now: nobody has begun it, and it is assigned to it, or to another."""
        number = self._number[unit]
        is_dealt = of_others or number % self._member.count == self._member.index
        if not is_dealt or self.is_complete(unit) or not self._memory.lock(number):
            return False
        if self.is_complete(unit):  # completed since the last check
            self._memory.unlock(number)
            return False
        return True

    def finish(self, unit: str) -> None:
        """Note that a unit that this member began is complete."""
        self._flags[self._number[unit]] = 1
        self._memory.unlock(self._number[unit])

    def leave(self) -> None:
        """Let other members load what this member began."""
        self._memory.unlock_all()

    def give_up(self, fault: EngineError) -> None:
        """Report to all members a fault that would occur in each of them."""
        if not int(self._length):
            text = f"{type(fault).__name__}{_SEPARATOR}{fault}".encode()[:_FAULT_BYTES]
            self._fault[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            self._length.fill_(len(text))

    @property
    def fault(self) -> EngineError | None:
        """The fault that a member reported."""
        length = int(self._length)
        if not length:
            return None
        name, _, text = bytes(self._fault[:length].tolist()).decode(errors="replace").partition(_SEPARATOR)
        fault: EngineError = getattr(errors, name)(text)
        return fault

    def close(self) -> None:
        """Release the locks; the memory is released with its last view."""
        self._memory.close()


def _to_page(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
