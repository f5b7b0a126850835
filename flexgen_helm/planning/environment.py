"""What a result was made with: versions of the software, the commit, and the machine. Loads neither HELM nor models."""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from flexgen_helm.planning.record import commit
from flexgen_helm.terminal.installation import version

DISTRIBUTIONS = ("flexgen-helm", "crfm-helm", "torch", "transformers")
"""The distributions whose versions can change a result; Python's version is recorded, too."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine, as far as it decides how fast a model runs and how sums are rounded."""

    device: str
    """The device, such as "NVIDIA H100 80GB HBM3", or the processor's name where there is no accelerator."""
    device_memory_bytes: int | None
    """The accelerator's memory; None where there is none."""
    host: str
    """The machine's name."""
    cores: int
    host_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What every record says of where it was made."""

    versions: Mapping[str, str]
    """The versions of installed `DISTRIBUTIONS`, and of python."""
    commit: str | None
    """The commit of the checkout; None where there is none."""
    hardware: Hardware

    def as_mapping(self) -> dict[str, Any]:
        """The form in which records hold it."""
        return asdict(self)


@cache
def environment() -> Environment:
    """This process's; looked at once, and not changed by what happens later."""
    found = commit()
    return Environment(versions=versions(), commit=None if found == "unknown" else found, hardware=hardware())


def versions() -> dict[str, str]:
    """Versions of what is installed of `DISTRIBUTIONS`, and of python."""
    known = {name: found for name in DISTRIBUTIONS if (found := version(name))}
    return {**known, "python": platform.python_version()}


def hardware() -> Hardware:
    """This machine; its first accelerator where it has several."""
    from engine.memory import accelerator
    from engine.planning.host_growth import known_limits
    from engine.planning.machine import this_machine

    machine, devices = this_machine(), accelerator.devices()
    return Hardware(
        device=(*machine.accelerators, machine.processor)[0],
        device_memory_bytes=accelerator.total_memory(devices[0]) if devices else None,
        host=socket.gethostname(),
        cores=machine.cores,
        host_memory_bytes=known_limits().total,
    )
