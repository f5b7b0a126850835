"""Several engines that run each sweep together: what each has of a layer goes to all of them, device to device."""

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
"""More than any member's longest sweep, for which others wait. A process that ends is noticed sooner."""


@dataclass(frozen=True)
class Agreed:
    """What the members of a group are about to do."""

    sweep: int
    """How many of them have something to compute."""
    leave: bool
    """Any of them ends."""


class Group:
    """The processes of a group, in torch.distributed, of which a process has one at a time.

    Every member gathers the same units in the same order, sweep by sweep, whether it has anything to compute or not.
    """

    def __init__(self, member: Member, device: torch.device) -> None:
        """Returns when all members are there; `EngineError` when they do not come."""
        assert member.meeting is not None
        self._member = member
        self.count = member.count
        """How many there are."""
        meet(member.meeting, member.index, member.count, device, _TIMEOUT)
        self._lost = f"one of the {self.count} engines that share the weights"
        with naming_the_lost(self._lost):
            self._agreeing: Any = distributed.new_group(backend="gloo", timeout=_TIMEOUT)

    def agree(self, *, sweep: bool, leave: bool = False) -> Agreed:
        """Wait for all members to say what they are about to do. Raises `EngineError` when one has gone."""
        said = torch.tensor([sweep, leave], dtype=torch.int32)
        with naming_the_lost(self._lost):
            distributed.all_reduce(said, group=self._agreeing)
        swept, left = said.tolist()
        return Agreed(sweep=swept, leave=left > 0)

    def gather(self, placed: PlacedUnit, slot: torch.Tensor) -> None:
        """Bring what the other members have of a unit to `slot`, in which this one's part is.

        On a device with streams the current one goes on when it is there; else this returns then. Raises `EngineError`
        when a member has gone.
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
        """Leave, after all members have agreed to."""
        part()
