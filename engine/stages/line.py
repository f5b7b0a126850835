"""Communication between stages through torch.distributed: scheduled sweeps and hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed

from engine.member import Member
from engine.weights.members.meeting import meet, naming_the_lost, part

_TIMEOUT = timedelta(days=300)
"""Stages wait for the next sweep as long as no job is submitted. The end of a process is noticed sooner."""
_MEETING = timedelta(minutes=30)
_AHEAD = 2
"""Micro-batches received ahead: one is computed while the next one is received."""
_REASON_BYTES = 512
"""Longest text, in bytes, that says why a sweep is lost."""


class StageLine:
    """The connections between the processes of a model's stages; a process is a stage of one model at a time.

    The leading stage sends every sweep's schedule to all others. Each stage receives the hidden states of micro-batches
    from the stage before it, in order, and sends them on to the next stage, while it goes on to another sweep. Raises
    `EngineError` if another stage has ended.
    """

    def __init__(self, member: Member, device: torch.device, width: int, dtype: torch.dtype, num_lanes: int) -> None:
        """width: size of a row's hidden state. Returns when all stages have connected."""
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
        """For each lane, the sends of its last sweep's schedule, kept until they have completed."""
        self._handed: list[list[tuple[Any, torch.Tensor]]] = [[] for _ in range(num_lanes)]
        self._lane = 0
        self._sizes: Sequence[int] = ()
        self._num_asked = 0
        self._coming: dict[int, tuple[Any, torch.Tensor]] = {}
        self._waiting: dict[int, torch.Tensor] = {}
        """Hidden states of micro-batches that were computed before their turn to be sent."""
        self._num_handed = 0

    def tell(self, lane: int, numbers: torch.Tensor) -> None:
        """Send the schedule of a lane's next sweep to all other stages; the lane's last sweep must have ended."""
        with naming_the_lost(self._lost):
            _settle(self._told[lane])
            for tensor in (torch.tensor([len(numbers)]), numbers):
                self._told[lane] += [(self._sent(tensor, to, self._telling), tensor) for to in self._others]

    def hear(self) -> torch.Tensor | None:
        """Receive the schedule of the next sweep, as given to `tell`; None if there is none any more."""
        with naming_the_lost(self._lost):
            size = torch.zeros(1, dtype=torch.int64)
            distributed.recv(size, 0, group=self._telling)
            if not size.item():
                return None
            numbers = torch.empty(int(size.item()), dtype=torch.int64)
            distributed.recv(numbers, 0, group=self._telling)
        return numbers

    def end(self) -> None:
        """Tell all other stages that there are no more sweeps."""
        with naming_the_lost(self._lost):
            for to in self._others:
                distributed.send(torch.zeros(1, dtype=torch.int64), to, group=self._telling)

    def begin(self, lane: int, sizes: Sequence[int]) -> None:
        """Begin a sweep of a lane; `sizes` are the numbers of rows of its micro-batches."""
        self._lane, self._sizes = lane, sizes
        self._num_asked, self._num_handed = 0, 0
        self._coming, self._waiting = {}, {}
        with naming_the_lost(self._lost):
            _settle(self._handed[lane])  # the lane's last sweep has ended, so its sends are complete

    def take(self, number: int) -> torch.Tensor:
        """Receive a micro-batch's hidden states `[rows, width]` from the stage before; in order, each once."""
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
        """Send a micro-batch's hidden states `[rows, width]` to the next stage; in any order, each once."""
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
        """Disconnect from the other stages."""
        part()


def _settle(sent: list[tuple[Any, torch.Tensor]]) -> None:
    """Wait for sends to complete, and release their tensors."""
    for work, _ in sent:
        work.wait()
    sent.clear()
