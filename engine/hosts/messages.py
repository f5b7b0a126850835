"""The messages between a driver and its hosts, in addition to those of worker processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.planning.planner import Plan
from engine.policy import Policy
from engine.schedule.timing import SweepTiming
from engine.workers.handing_out.sharing_out import Room
from engine.workers.messages import Done, Entered, Fault, Note
from engine.workers.packing import PackedJobs


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Opens a model under a policy, whose `auto` parts each host decides for its own machine."""

    model: str
    """A hub id, or a directory that exists under this name on every host."""
    policy: Policy
    window: int | None = None
    """Most positions of a sequence, overriding the model's configuration."""
    jobs: PackedJobs
    """A sample of the jobs to come, for policies that are chosen by them."""
    share: float = 1.0
    """The size of `jobs` as a part of one host's work, roughly."""


@dataclass(frozen=True, kw_only=True)
class HostOpened:
    """Says that the model is open on the host; its weights may still be loading."""

    devices: tuple[str, ...]
    """The devices that the host computes on, named as in its sweeps' timings."""
    versions: Mapping[str, str]
    """Versions that must be equal everywhere, by package or program name."""
    identity: Mapping[str, str | int | None]
    """Everything of the model and policy that can change a result, except for the weights."""
    window: int | None
    vocab_size: int
    pad_token: int
    sweep: Room
    """The work that fills a sweep of all the host's devices."""
    plan: Plan | None = None
    """The plan of each of its devices."""


@dataclass(frozen=True, kw_only=True)
class Vouched:
    """The digest of the host's weight files; None if its weights come from no files.

    The driver uses none of the host's completions before it has this message.
    """

    digest: str | None


@dataclass(frozen=True, kw_only=True)
class HostSwept:
    """Says that a sweep has ended on the host."""

    timing: SweepTiming
    """The sweep's times; `begun` is a reading of the host's own clock."""
    ago_s: float
    """Seconds since the host began to schedule the sweep."""


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """Says that the host takes no more jobs: it completes the current sweep and ends."""

    why: str


@dataclass(frozen=True, kw_only=True)
class Alive:
    """Says that the host is alive; sent when there is nothing else to send."""


HostTells = HostOpened | Vouched | HostSwept | Leaving | Alive | Entered | Done | Note | Fault
