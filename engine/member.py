"""One of several engines that run the same model on the devices of one machine (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.memory.tiers import Memory


@dataclass(frozen=True, kw_only=True)
class Member:
    """One of several engines that run the same model in processes of one machine, each on a device of its own.

    All members are opened with the same model and policy, except the device, and with the same memory, so that they
    make the same plan.
    """

    index: int
    """0 .. count - 1."""
    count: int
    gather: bool
    """Whether weights are split among the members and gathered layer by layer; otherwise each has them all."""
    memory: Memory
    """The memory that every member plans with: `device` for each (the smallest), `host` and `disk` for all together."""
    weights: int | None
    """The file descriptor of the shared memory (memfd, empty at first) for weights in host memory; each has its own."""
    meeting: str | None
    """The path of the file, absent at first, through which torch.distributed's processes meet; gather only."""
