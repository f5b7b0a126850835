"""The facts that identify machines with different rates. Imports no torch."""

from __future__ import annotations

import hashlib
import platform
import re
from dataclasses import dataclass

from engine.memory.cores import usable_cores
from engine.planning.host_limits import host_limits


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The facts that identify machines with different rates."""

    accelerators: tuple[str, ...]
    """The names of all accelerators that torch sees; empty on a machine without any."""
    processor: str
    cores: int
    """The number of cores that the process may use."""
    host_memory_bytes: int

    def __str__(self) -> str:
        parts = [*self.accelerators, self.processor, f"{self.cores} cores", f"{self.host_memory_bytes / 2**30:.0f} GiB"]
        return ", ".join(parts)

    @property
    def key(self) -> str:
        """A name for files: the device, and a digest of everything but the memory.

        A machine's memory may change: by a container's limit, or in a virtual machine whose memory grows on demand.
        """
        name = re.sub(r"[^a-z0-9]+", "-", (*self.accelerators, self.processor)[0].lower()).strip("-")
        facts = "\n".join((*self.accelerators, self.processor, str(self.cores)))
        return f"{name[:40]}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"


def this_machine() -> Machine:
    """The machine that runs this; imports torch to see its accelerators."""
    from engine.memory import accelerator

    return Machine(
        accelerators=tuple(accelerator.name_of(device) for device in accelerator.devices()),
        processor=processor_name(),
        cores=usable_cores(),
        host_memory_bytes=host_limits().total,
    )


def processor_name() -> str:
    """The manufacturer's name of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
