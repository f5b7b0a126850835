"""Several engines that compute each sweep together: every layer's parts are gathered from device to device."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed

from engine.member import Member
from engine.weights.members.meeting import meet, naming_the_lost, part
from engine.weights.placed_unit import PlacedUnit

_TIMEOUT = timedelta(minutes=30)
"""Longer than any member's longest sweep, which the others wait for. The end of a process is noticed sooner."""


@dataclass(frozen=True)
class Agreed:
    """What the members of a group are about to do."""

    sweep: int
    """The number of members that have something to compute."""
    leave: bool
    """Whether a member ends."""


class Group:
    """The processes of a group, connected by torch.distributed; a process has one group at a time.

    Every member gathers the same units in the same order, sweep by sweep, whether or not it has anything to compute.
    """

    def __init__(self, member: Member, device: torch.device) -> None:
        """Connect to the other members; raises `EngineError` if they do not come."""
        assert member.meeting is not None
        self._member = member
        self.count = member.count
        """The number of members."""
        meet(member.meeting, member.index, member.count, device, _TIMEOUT)
        self._lost = f"one of the {self.count} engines that share the weights"
        with naming_the_lost(self._lost):
            self._agreeing: Any = distributed.new_group(backend="gloo", timeout=_TIMEOUT)

    def agree(self, *, sweep: bool, leave: bool = False) -> Agreed:
        """Exchange with all members what each is about to do. Raises `EngineError` if a member has ended."""
        said = torch.tensor([sweep, leave], dtype=torch.int32)
        with naming_the_lost(self._lost):
            distributed.all_reduce(said, group=self._agreeing)
        swept, left = said.tolist()
        return Agreed(sweep=swept, leave=left > 0)

    def gather(self, placed: PlacedUnit, slot: torch.Tensor) -> None:
        """Copy the other members' parts of a unit to `slot`, which already holds this member's part.

        On a device with streams, the current stream waits for the copies; otherwise this function does. Raises
        `EngineError` if a member has ended.
        """
        size = placed.gathered_bytes // self._member.count
        whole = slot[: placed.gathered_bytes]
        own = whole[self._member.index * size : (self._member.index + 1) * size]
        gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
        with naming_the_lost(self._lost):
            work = gather(whole, own, async_op=True)
            assert work is not None
            work.wait()

    def close(self) -> None:
        """Disconnect, after all members have agreed to."""
        part()
