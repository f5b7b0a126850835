"""What a host is told, and what it tells, beside what an engine's process does."""

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
    """Open this model, under a policy that each host completes for its own machine."""

    model: str
    """A hub id, or a directory that every host has under this name."""
    policy: Policy
    window: int | None = None
    """Most positions of a sequence, in place of what the model's files tell."""
    jobs: PackedJobs
    """Some of those that will be asked, for policies that are chosen by them."""
    share: float = 1.0
    """What part of a host's work `jobs` are, about."""


@dataclass(frozen=True, kw_only=True)
class HostOpened:
    """The model is open there; its weights may still be read."""

    devices: tuple[str, ...]
    """That the host computes on, by the names that its timings have."""
    versions: Mapping[str, str]
    """Of what must be the same everywhere, by name."""
    identity: Mapping[str, str | int | None]
    """What of model and policy can change a result, but for the weights."""
    window: int | None
    vocab_size: int
    pad_token: int
    sweep: Room
    """What a sweep of all its devices takes."""
    plan: Plan | None = None
    """Of each of its devices."""


@dataclass(frozen=True, kw_only=True)
class Vouched:
    """The digest of the host's weight files; None where its weights come from no files.

    Completions that it tells before this are not used before it.
    """

    digest: str | None


@dataclass(frozen=True, kw_only=True)
class HostSwept:
    """A sweep has ended there."""

    timing: SweepTiming
    """Its `begun` means nothing elsewhere."""
    ago_s: float
    """Since the sweep was begun to be put together."""


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """The host gets nothing more: it tells what the sweep at hand completes, and ends."""

    why: str


@dataclass(frozen=True, kw_only=True)
class Alive:
    """The host is there; told when there is nothing else to tell."""


HostTells = HostOpened | Vouched | HostSwept | Leaving | Alive | Entered | Done | Note | Fault
