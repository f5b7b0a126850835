"""One of several engines that run one model together, each in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.planning.hardware import Memory


@dataclass(frozen=True, kw_only=True)
class Member:
    """One of several engines that run the same model in processes of one machine, each on a device of its own."""

    index: int
    """0 .. count - 1."""
    count: int
    gather: bool
    """Whether weights are split among the members and gathered layer by layer; else each has them all."""
    memory: Memory
    """What every member may plan with: the least of all."""
    weights: int | None
    """File descriptor of the shared memory (memfd) for weights in host memory; where each has them all."""
    meeting: str | None
    """Path of the file through which torch.distributed's processes meet; with `gather` only."""
