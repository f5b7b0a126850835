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
    stages: bool = False
    """Whether each member has, and computes, some consecutive layers: the first member the last layers, and the others
    those before, in order (docs/adr/0035)."""
    memory: Memory
    """The memory that every member plans with: `device` for each (the smallest), `host` and `disk` for all together."""
    weights: int | None
    """The file descriptor of the shared memory (memfd, empty at first) for weights in host memory; each has its own."""
    meeting: str | None
    """Where torch.distributed's processes meet: the path of a file, absent at first, or `tcp://host:port`, at which the
    first member listens. None where members neither gather nor are stages."""

    @property
    def is_bound(self) -> bool:
        """Whether no member can continue without the others."""
        return self.gather or self.stages

    @property
    def leads(self) -> bool:
        """Whether this is the stage that takes jobs, and tells the other stages what to compute."""
        return self.stages and self.index == 0

    @property
    def stage(self) -> int:
        """The stage's number, in the order of the layers; the last stage leads."""
        return (self.index - 1) % self.count

    def index_of(self, stage: int) -> int:
        """The index of the member that is this stage."""
        return (stage + 1) % self.count
