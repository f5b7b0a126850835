"""What an engine's process is told, and what it tells."""

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
    """Say what devices there are, and what memory a run under this policy may use; only before a model is open."""

    policy: Policy


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What devices there are, and what memory a run may use, on the first of those of its policy."""

    devices: tuple[Device, ...]
    """All that torch sees, the best kind first; empty where there is the CPU alone."""
    free: tuple[int, int] | None
    """Bytes of the policy's device that are free, and all; None where its memory is the host's."""
    memory: Memory | EngineError
    """Or why that is not known."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Say whether this model can be run under this policy, and get the device ready; only before a model is open."""

    description: ModelDescription
    policy: Policy


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What keeps a model from being run; None where nothing does."""

    error: BaseException | None


@dataclass(frozen=True, kw_only=True)
class Open:
    """Open this model; the first message, but for `Look` and `Check`."""

    model: str
    """A hub id or directory."""
    policy: Policy
    window: int | None
    """Most positions of a sequence, in place of what the model's files tell."""
    member: Member | None
    """Which of several engines it is; None where it is the only one.

    Its descriptor of shared memory is the sender's; the message is followed by one of the receiver's own.
    """


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Run these jobs."""

    call: int
    """Whose they are."""
    jobs: PackedJobs


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Drop what of this call has not ended."""

    call: int


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare completions with what stock layers of transformers compute."""

    jobs: Sequence[Job]
    completions: Sequence[Completion]


@dataclass(frozen=True, kw_only=True)
class Close:
    """End after the sweep at hand, whose completions are told."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The model is open; its weights may still be read."""

    path: str
    """The model's directory."""
    dtype: str
    """That it computes in."""
    plan: Plan
    window: int | None
    vocab_size: int
    pad_token: int
    placed: Mapping[str, Mapping[Tier, int]]
    """Bytes of each unit's weights by tier."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """All weights are in place."""


@dataclass(frozen=True, kw_only=True)
class Digested:
    """The digest of the weight files, when all are read; None where the weights come from no files."""

    digest: str | None
    error: EngineError | None = None
    """Why there is none, where the weights cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something that a user should read."""

    logger: str | None
    """That it goes to; None for a warning."""
    level: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Entered:
    """Jobs that are about to be computed for the first time."""

    numbers: Numbers


@dataclass(frozen=True, kw_only=True)
class Swept:
    """A sweep has ended; its completions follow."""

    timing: SweepTiming


@dataclass(frozen=True, kw_only=True)
class Done:
    """Completions of one sweep."""

    completions: PackedCompletions


@dataclass(frozen=True, kw_only=True)
class Stage:
    """How far a comparison is."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What a comparison found, or why it ended without."""

    outcome: Findings | BaseException


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The engine cannot go on."""

    error: BaseException


Told = Look | Check | Open | Ask | Drop | Compare | Close
Tells = Seen | Checked | Opened | Loaded | Digested | Note | Entered | Swept | Done | Stage | Compared | Fault
