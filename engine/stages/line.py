"""What stages send each other through torch.distributed: what is to be computed, and hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed

from engine.member import Member
from engine.weights.members.meeting import meet, naming_the_lost, part

_TIMEOUT = timedelta(days=300)
"""Stages wait for each other as long as nobody asks for anything. A process that ends is noticed sooner."""
_MEETING = timedelta(minutes=30)
_AHEAD = 2
"""Micro-batches whose hidden states are taken or under way: one is computed with while the next one comes."""
_REASON_BYTES = 512
"""Of the text that says why a sweep is lost."""


class StageLine:
    """The processes of a model's stages; a process is a stage of one model at a time.

    The stage that leads tells all others of a sweep. Each takes the hidden states of its micro-batches from the stage
    before, in their order, and hands them on to the next one; it goes on to another sweep while they are taken there.
    Raises `EngineError` where another stage has gone.
    """

    def __init__(self, member: Member, device: torch.device, width: int, dtype: torch.dtype, num_lanes: int) -> None:
        """width: numbers of a row's hidden states. Returns when all stages are there."""
        assert member.meeting is not None
        self.member = member
        self._device, self._width, self._dtype = device, width, dtype
        self._before = member.index_of(member.stage - 1)
        self._after = member.index_of(member.stage + 1)
        self._lost = f"one of the {member.count} stages of the model"
        meet(member.meeting, member.index, member.count, device, _MEETING)
        with naming_the_lost(self._lost):
            self._telling: Any = distributed.new_group(backend="gloo", timeout=_TIMEOUT)
            backend = "nccl" if device.type == "cuda" else "gloo"
            self._handing: Any = distributed.new_group(backend=backend, timeout=_TIMEOUT)
        self._told: list[list[tuple[Any, torch.Tensor]]] = [[] for _ in range(num_lanes)]
        """By lane: what is under way of its last sweep, kept until that has come back."""
        self._handed: list[list[tuple[Any, torch.Tensor]]] = [[] for _ in range(num_lanes)]
        self._lane = 0
        self._sizes: Sequence[int] = ()
        self._num_asked = 0
        self._coming: dict[int, tuple[Any, torch.Tensor]] = {}
        self._waiting: dict[int, torch.Tensor] = {}
        """Hidden states of micro-batches that are computed before their turn to be handed on."""
        self._num_handed = 0

    def tell(self, lane: int, numbers: torch.Tensor) -> None:
        """Tell all other stages of a lane's next sweep; that of its last one must have come back."""
        with naming_the_lost(self._lost):
            _settle(self._told[lane])
            for tensor in (torch.tensor([len(numbers)]), numbers):
                self._told[lane] += [(self._sent(tensor, to, self._telling), tensor) for to in self._others]

    def hear(self) -> torch.Tensor | None:
        """The next sweep to compute, as `tell` was given it; None when there is none any more."""
        with naming_the_lost(self._lost):
            size = torch.zeros(1, dtype=torch.int64)
            distributed.recv(size, 0, group=self._telling)
            if not size.item():
                return None
            numbers = torch.empty(int(size.item()), dtype=torch.int64)
            distributed.recv(numbers, 0, group=self._telling)
        return numbers

    def end(self) -> None:
        """Tell all other stages that there is nothing more to compute."""
        with naming_the_lost(self._lost):
            for to in self._others:
                distributed.send(torch.zeros(1, dtype=torch.int64), to, group=self._telling)

    def begin(self, lane: int, sizes: Sequence[int]) -> None:
        """Begin a sweep of a lane, over micro-batches of so many rows."""
        self._lane, self._sizes = lane, sizes
        self._num_asked, self._num_handed = 0, 0
        self._coming, self._waiting = {}, {}
        with naming_the_lost(self._lost):
            _settle(self._handed[lane])  # its last sweep has come back, so they are there

    def take(self, number: int) -> torch.Tensor:
        """What the stage before has made of a micro-batch: hidden `[rows, width]`; in their order, each once."""
        with naming_the_lost(self._lost):
            while self._num_asked < min(number + _AHEAD, len(self._sizes)):
                hidden = self._new(self._sizes[self._num_asked])
                coming = distributed.irecv(hidden, self._before, group=self._handing)
                self._coming[self._num_asked] = coming, hidden
                self._num_asked += 1
            coming, hidden = self._coming.pop(number)
            coming.wait()
        return hidden

    def hand_on(self, number: int, hidden: torch.Tensor) -> None:
        """Send the next stage the hidden states `[rows, width]` of a micro-batch; each once, in whatever order."""
        self._waiting[number] = hidden.contiguous()
        with naming_the_lost(self._lost):
            while (due := self._waiting.pop(self._num_handed, None)) is not None:
                self._handed[self._lane].append((self._sent(due, self._after, self._handing), due))
                self._num_handed += 1

    def forgo(self) -> None:
        """Do without the rest of the sweep: take what is to come of it, and hand on zeros in place of what is lacking.

        What was asked for before is done with.
        """
        rows = max(self._sizes, default=0)
        with naming_the_lost(self._lost):
            for coming, _ in self._coming.values():
                coming.wait()
            if self.member.stage > 0:
                scrap = self._new(rows)
                for size in self._sizes[self._num_asked :]:
                    distributed.recv(scrap[:size], self._before, group=self._handing)
            if not self.member.leads:
                zeros = self._new(rows).zero_()
                for size in self._sizes[self._num_handed :]:
                    self._handed[self._lane].append((self._sent(zeros[:size], self._after, self._handing), zeros))
        self._coming, self._waiting = {}, {}

    def settle(self, reason: str) -> str:
        """End a sweep: tell the next stage why it is lost, or "", and learn that from the stage before.

        Returns the reason of the first stage that has one.
        """
        number = self.member.stage
        with naming_the_lost(self._lost):
            if number > 0:
                told = torch.empty(_REASON_BYTES, dtype=torch.uint8)
                distributed.recv(told, self._before, group=self._telling)
                before = bytes(told.tolist()).rstrip(b"\0").decode(errors="replace")
                reason = before or (reason and f"stage {number}: {reason}")
            else:
                reason = reason and f"stage {number}: {reason}"
            if not self.member.leads:
                text = reason.encode()[:_REASON_BYTES].ljust(_REASON_BYTES, b"\0")
                told = torch.frombuffer(bytearray(text), dtype=torch.uint8)
                self._handed[self._lane].append((self._sent(told, self._after, self._telling), told))
        return reason

    def _new(self, rows: int) -> torch.Tensor:
        return torch.empty(rows, self._width, dtype=self._dtype, device=self._device)

    @property
    def _others(self) -> range:
        return range(1, self.member.count)

    @staticmethod
    def _sent(tensor: torch.Tensor, to: int, group: Any) -> Any:
        return distributed.isend(tensor, to, group=group)

    def close(self) -> None:
        """Leave."""
        part()


def _settle(sent: list[tuple[Any, torch.Tensor]]) -> None:
    """Let go of what has been sent."""
    for work, _ in sent:
        work.wait()
    sent.clear()
