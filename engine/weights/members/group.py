"""Several engines that run each sweep together: what each has of a layer goes to all of them, device to device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from engine.errors import EngineError, one_line
from engine.member import Member
from engine.memory import accelerator
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
        os.environ.update(accelerator.GATHERING)
        on_cuda = device.type == "cuda"
        try:
            with accelerator.on_device(device) if on_cuda else nullcontext():
                distributed.init_process_group(
                    "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
                    init_method=Path(member.meeting).absolute().as_uri(),
                    rank=member.index,
                    world_size=member.count,
                    timeout=_TIMEOUT,
                    device_id=device if on_cuda else None,
                )
                self._agreeing: Any = distributed.new_group(backend="gloo", timeout=_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise EngineError(
                f"engine {member.index} of {member.count} cannot meet the others through {member.meeting}: "
                f"{one_line(error)}; start all of them again"
            ) from error

    def agree(self, *, sweep: bool, leave: bool = False) -> Agreed:
        """Wait for all members to say what they are about to do. Raises `EngineError` when one has gone."""
        said = torch.tensor([sweep, leave], dtype=torch.int32)
        with self._naming_the_lost():
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
        with self._naming_the_lost():
            work = gather(whole, own, async_op=True)
            assert work is not None
            work.wait()

    @contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise EngineError(
                f"one of the {self.count} engines that share the weights has gone: {one_line(error)}; start all of "
                "them again"
            ) from error

    def close(self) -> None:
        """Leave, after all members have agreed to."""
        if distributed.is_initialized():
            distributed.destroy_process_group()
