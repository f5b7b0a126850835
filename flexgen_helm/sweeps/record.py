"""The record of a sweep over a suite, written next to the suite's runs, and read by reports."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from engine.errors import ConfigError
from engine.memory.replaced import replace_text
from engine.reading import find_file
from flexgen_helm.planning.environment import Hardware
from flexgen_helm.planning.stored import SINCE, read_versioned
from flexgen_helm.sweeps.device_time import DeviceTime

FILE_NAME = "flexgen_sweep.json"
VERSION = 1
MOST_POINTS = 500
"""The most points of a timeline, so that a record stays small however long the sweep was."""

_CURE = "remove it, or run the sweep again"

RunStatus = Literal["done", "failed", "skipped", "unjudged"]


@dataclass(frozen=True, kw_only=True)
class TimeSplit:
    """How a model's seconds were spent."""

    load: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    host: float = 0.0
    """The rest: tokenizing, the cache, metrics."""


@dataclass(frozen=True, kw_only=True)
class TimelinePoint:
    """One sweep over the layers, or several adjacent ones together."""

    at: float
    """Seconds from the model's start to the point's start."""
    seconds: float
    prefill_rows: int
    decode_rows: int
    sequences: int
    """The active sequences; of several sweeps, the most."""
    new_tokens: int | None = field(default=None, metadata=SINCE)
    """Tokens of answers and of thinking that sequences were given; None in records of earlier releases."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The distribution of numbers of tokens. A quantile is the smallest number that such a share does not exceed."""

    texts: int
    tokens: int
    """The tokens of all texts together."""
    median: int
    ninth_decile: int
    longest: int
    bins: tuple[int, ...]
    """The number of texts that are empty, have 1 token, 2 or 3, 4 to 7, and so on: bin n has the numbers of n binary
    digits."""

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Lengths | None:
        """The lengths of texts with so many tokens each; None where there is no text."""
        found = sorted(numbers)
        if not found:
            return None
        digits = Counter(number.bit_length() for number in found)
        return cls(
            texts=len(found),
            tokens=sum(found),
            median=found[math.ceil(0.5 * len(found)) - 1],
            ninth_decile=found[math.ceil(0.9 * len(found)) - 1],
            longest=found[-1],
            bins=tuple(digits[each] for each in range(found[-1].bit_length() + 1)),
        )


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """What one deployment of the suite did. Tokens and seconds are those of computed requests, not of cached ones."""

    deployment: str
    policy: Mapping[str, Any]
    plan: Mapping[str, Any]
    seconds: float
    """Wall time, loading included."""
    limit_s: float | None
    """The least seconds that the hardware would need; None where its rates are not known."""
    fraction: float | None
    """`limit_s / seconds`."""
    requests: int
    cached: int
    """Requests that HELM's cache answered."""
    computed: int
    """Requests that the engine computed; identical ones count once."""
    prompt_tokens: int
    """The prompt tokens as requested: shared prefixes count for each request."""
    prefix_tokens_saved: int
    """The prompt tokens that need not be computed because prefixes are shared."""
    new_tokens: int
    sweeps: int
    time_split: TimeSplit
    timeline: tuple[TimelinePoint, ...] = ()
    """The points in order; at most about `MOST_POINTS`, see `thinned`."""
    chat_template: bool | None = field(default=None, metadata=SINCE)
    """Whether prompts that are answered, not only scored, went through the tokenizer's chat template."""
    identity: Mapping[str, Any] = field(default_factory=dict, metadata=SINCE)
    """Everything of the model and policy that can change a result: digests of the checkpoint, dtype, compression."""
    seeds: str = field(default="", metadata=SINCE)
    """How the seeds of sampled completions are derived from requests."""
    deaths: tuple[str, ...] = field(default=(), metadata=SINCE)
    """How processes of its engine ended that were replaced; their unanswered requests were computed again."""
    devices: tuple[DeviceTime, ...] = field(default=(), metadata=SINCE)
    """How the time of each device was spent."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The outcome of one run."""

    name: str
    """HELM's name of the run spec, which is also its directory's."""
    deployment: str
    status: RunStatus
    """"skipped": an earlier command had completed it. "unjudged": it is answered, and waits for a judge."""
    error: str | None = None
    """Why the run failed, in one line."""
    requests: int
    cached: int
    failed_requests: int
    """The number of requests that were not answered; in a run that is done they count as empty answers."""
    new_tokens: int
    seconds: float
    """The seconds from the sweep's start of the model to the run's last file."""
    verdicts: int = field(default=0, metadata=SINCE)
    """Answers that were to be judged by another model."""
    unreadable_verdicts: int = field(default=0, metadata=SINCE)
    """The number of those whose verdict could not be read; they score nothing, like the following."""
    missing_verdicts: int = field(default=0, metadata=SINCE)
    """The number of those that the judge could not get, or did not answer."""
    cut_off: int = field(default=0, metadata=SINCE)
    """Answers that are empty because there was no room for more than their thinking."""
    thinking: Lengths | None = field(default=None, metadata=SINCE)
    """The lengths of thinking before answers, tags included; None where there was none, or its tokens are not known."""


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """A whole suite."""

    version: int = VERSION
    suite: str
    started: str
    """ISO 8601, with the zone."""
    finished: str | None
    """The time of the end; None as long as the sweep runs, and after it was killed."""
    versions: Mapping[str, str]
    """The versions of flexgen-helm, crfm-helm, torch, transformers and python."""
    commit: str | None
    hardware: Hardware
    models: tuple[ModelRecord, ...] = field(default=())
    runs: tuple[RunRecord, ...] = field(default=())
    judge: ModelRecord | None = field(default=None, metadata=SINCE)
    """What the model did that judged runs of the suite; it may be one of `models`, too."""


def counted(statuses: Iterable[RunStatus]) -> dict[str, int]:
    """The number of runs by outcome; those that wait for a judge are named only where there are any."""
    found = Counter(statuses)
    return {status: found[status] for status in ("done", "failed", "skipped")} | (
        {"unjudged": found["unjudged"]} if found["unjudged"] else {}
    )


def thinned(points: Sequence[TimelinePoint], most: int = MOST_POINTS) -> tuple[TimelinePoint, ...]:
    """A timeline of at most `most` points: equally many neighbours become one, which has their sums."""
    group = max(1, math.ceil(len(points) / most))
    return tuple(_together(points[at : at + group]) for at in range(0, len(points), group))


def _together(points: Sequence[TimelinePoint]) -> TimelinePoint:
    return TimelinePoint(
        at=points[0].at,
        seconds=math.fsum(point.seconds for point in points),
        prefill_rows=sum(point.prefill_rows for point in points),
        decode_rows=sum(point.decode_rows for point in points),
        sequences=max(point.sequences for point in points),
        new_tokens=None if points[0].new_tokens is None else sum(point.new_tokens or 0 for point in points),
    )


def write_record(suite_path: Path, record: SweepRecord) -> Path:
    """Write `flexgen_sweep.json` into a suite's directory, atomically, creating the directory; returns its path.

    Raises `OSError` if the file cannot be written, `ValueError` for a number that is not finite.
    """
    suite_path.mkdir(parents=True, exist_ok=True)
    path = suite_path / FILE_NAME
    replace_text(path, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")
    return path


def read_record(suite_path: Path) -> SweepRecord | None:
    """The record in a suite's directory; None where there is none, `ConfigError` where it is not one."""
    path = suite_path / FILE_NAME
    if not find_file(path, ConfigError):
        return None
    record = read_versioned(path, SweepRecord, VERSION, what="record of a sweep", cure=_CURE)
    try:
        for moment in (record.started, record.finished):
            if moment is not None and datetime.fromisoformat(moment).tzinfo is None:
                raise ValueError(f"{moment!r} has no time zone")
    except ValueError as error:
        raise ConfigError(f"{path} is no record of a sweep: {error}; {_CURE}") from None
    return record
