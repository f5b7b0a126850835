"""One of several engines that run the same model on the devices of one machine (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.memory.tiers import Memory


@dataclass(frozen=True, kw_only=True)
class Member:
    """One of several engines that run the same model in processes of one machine, each on a device of its own.

    All members are opened with the same model and policy, but for the device, and with the same memory, so that they
    make the same plan.
    """

    index: int
    """0 .. count - 1."""
    count: int
    gather: bool
    """Weights are split among the members and gathered layer by layer; else each has them all."""
    stages: bool = False
    """Each has, and computes, some consecutive layers: the first member the last ones, and the others, in their order,
    those before (docs/adr/0035)."""
    memory: Memory
    """What every member may plan with: `device` for each (the least of all), `host` and `disk` for all together."""
    weights: int | None
    """File descriptor of the shared memory (memfd, empty at first) for weights in host memory; each for itself."""
    meeting: str | None
    """Where torch.distributed's processes meet: path of a file, absent at first, or `tcp://host:port`, at which the
    first member listens. None where members neither gather nor are stages."""

    @property
    def is_bound(self) -> bool:
        """Whether none can go on without the others."""
        return self.gather or self.stages

    @property
    def leads(self) -> bool:
        """Whether it is the one of several stages that is asked, and tells the others what to compute."""
        return self.stages and self.index == 0

    @property
    def stage(self) -> int:
        """Which stage it is, in the order of the layers; the last one leads."""
        return (self.index - 1) % self.count

    def index_of(self, stage: int) -> int:
        """The member that a stage is."""
        return (stage + 1) % self.count
