"""The messages between an engine and its worker processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.job import Completion, Job
from engine.member import Member
from engine.memory.tiers import Tier
from engine.planning.devices import Device
from engine.planning.hardware import Memory
from engine.planning.planner import Plan
from engine.policy import Policy
from engine.schedule.timing import SweepTiming
from engine.workers.packing import Numbers, PackedCompletions, PackedJobs

if TYPE_CHECKING:
    from engine.checkpoint.description import ModelDescription
    from engine.verification.layerwise import Findings


@dataclass(frozen=True, kw_only=True)
class Look:
    """Asks for the devices, and the memory that a run under this policy may use; sent only before a model is opened."""

    policy: Policy


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The answer to `Look`: the devices, and the memory a run may use on the first device of the policy."""

    devices: tuple[Device, ...]
    """All devices that torch sees, the preferred kind first; empty if there is only the CPU."""
    free: tuple[int, int] | None
    """Free and total bytes of the policy's device; None if it has no memory apart from the host's."""
    memory: Memory | EngineError
    """The memory a run may use, or the error that kept it from being determined."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Asks whether a model runs under a policy, and initializes the device; sent only before a model is opened."""

    description: ModelDescription
    policy: Policy


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The answer to `Check`: the error that keeps the model from running, or None."""

    error: BaseException | None


@dataclass(frozen=True, kw_only=True)
class Open:
    """Opens a model; the first message, except for `Look` and `Check`."""

    model: str
    """A hub id or directory."""
    policy: Policy
    window: int | None
    """Most positions of a sequence, overriding the model's configuration; None keeps that."""
    member: Member | None
    """Which of several workers the process is; None if it is the only one.

    Its file descriptor of shared memory is valid in the sender; the receiver's own descriptor follows the message.
    """


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Runs jobs."""

    call: int
    """The number of the call that the jobs belong to."""
    jobs: PackedJobs


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Cancels everything unfinished of a call."""

    call: int


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compares completions with what stock layers of transformers compute."""

    jobs: Sequence[Job]
    completions: Sequence[Completion]


@dataclass(frozen=True, kw_only=True)
class Close:
    """Ends the process after the current sweep, whose completions are still sent."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Says that the model is open; its weights may still be loading."""

    path: str
    """The model's directory."""
    dtype: str
    """The dtype that the engine computes in."""
    plan: Plan
    window: int | None
    vocab_size: int
    pad_token: int
    placed: Mapping[str, Mapping[Tier, int]]
    """Bytes of each unit's weights, by tier."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Says that all weights are in place."""


@dataclass(frozen=True, kw_only=True)
class Digested:
    """The digest of the weight files, once all are read; None if the weights come from no files."""

    digest: str | None
    error: EngineError | None = None
    """Why there is no digest, if the weight files cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """A line to log or to warn the user with."""

    logger: str | None
    """The logger's name; None for a warning."""
    level: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Entered:
    """Says that jobs are about to be computed for the first time."""

    numbers: Numbers


@dataclass(frozen=True, kw_only=True)
class Swept:
    """Says that a sweep has ended; its completions follow."""

    timing: SweepTiming


@dataclass(frozen=True, kw_only=True)
class Done:
    """The completions of one sweep."""

    completions: PackedCompletions


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The progress of a comparison."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The findings of a comparison, or the error that ended it."""

    outcome: Findings | BaseException


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Says that the engine cannot continue."""

    error: BaseException


Told = Look | Check | Open | Ask | Drop | Compare | Close
Tells = Seen | Checked | Opened | Loaded | Digested | Note | Entered | Swept | Done | Stage | Compared | Fault
