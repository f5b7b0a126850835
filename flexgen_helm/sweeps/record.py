"""What a sweep over a suite did: the record that it writes beside the suite's runs, and that reports read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from engine.errors import ConfigError
from engine.reading import MAX_JSON_BYTES, find_file, read_bytes

FILE_NAME = "flexgen_sweep.json"
VERSION = 1
MOST_POINTS = 500
"""Of a timeline, so that a record stays small however long the sweep was."""

_SINCE = {"may be missing": True}
"""Of a field that records of earlier releases do not have: it then has its default."""

RunStatus = Literal["done", "failed", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a suite ran on."""

    device: str
    """Such as "NVIDIA H100 80GB HBM3", or the processor's name where there is no accelerator."""
    device_memory_bytes: int | None
    """Of the accelerator; None where there is none."""
    host: str
    """The machine's name."""
    cores: int
    host_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class TimeSplit:
    """Where a model's seconds went."""

    load: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    host: float = 0.0
    """What is neither: tokenizing, the cache, metrics."""


@dataclass(frozen=True, kw_only=True)
class TimelinePoint:
    """One sweep over the layers, or several neighbouring ones together."""

    at: float
    """Seconds from the model's start to the point's start."""
    seconds: float
    prefill_rows: int
    decode_rows: int
    sequences: int
    """Active ones; of several sweeps, the most."""


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """What one deployment of the suite did. Tokens and seconds are those of computed requests, not of cached ones."""

    deployment: str
    policy: Mapping[str, Any]
    plan: Mapping[str, Any]
    seconds: float
    """Wall time, loading included."""
    limit_s: float | None
    """The least time the hardware would need; None where its rates are not known."""
    fraction: float | None
    """`limit_s / seconds`."""
    requests: int
    cached: int
    """Requests that HELM's cache answered."""
    computed: int
    """Requests that the engine computed; identical ones count once."""
    prompt_tokens: int
    """As asked: shared prefixes count for each request."""
    prefix_tokens_saved: int
    """Of them, those that sharing made it unnecessary to compute."""
    new_tokens: int
    sweeps: int
    time_split: TimeSplit
    timeline: tuple[TimelinePoint, ...] = ()
    """In order; at most about `MOST_POINTS`, see `thinned`."""
    chat_template: bool | None = field(default=None, metadata=_SINCE)
    """Whether prompts that are answered, not only scored, went through the tokenizer's chat template."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What became of one run."""

    name: str
    """HELM's name of the run spec, which is also its directory's."""
    deployment: str
    status: RunStatus
    """"skipped": an earlier command had completed it."""
    error: str | None = None
    """One line; of a failed run."""
    requests: int
    cached: int
    failed_requests: int
    """Those that were not answered; in a run that is done they count as empty answers."""
    new_tokens: int
    seconds: float
    """From the sweep's start of the model to the run's last file."""


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """A whole suite."""

    version: int = VERSION
    suite: str
    started: str
    """ISO 8601, with the zone."""
    finished: str | None
    """None as long as the sweep runs, and after it was killed."""
    versions: Mapping[str, str]
    """Of flexgen-helm, crfm-helm, torch, transformers and python."""
    commit: str | None
    hardware: Hardware
    models: tuple[ModelRecord, ...] = field(default=())
    runs: tuple[RunRecord, ...] = field(default=())


def thinned(points: Sequence[TimelinePoint], most: int = MOST_POINTS) -> tuple[TimelinePoint, ...]:
    """A timeline of at most `most` points: equally many neighbours become one, which holds their sums."""
    group = max(1, math.ceil(len(points) / most))
    return tuple(_together(points[at : at + group]) for at in range(0, len(points), group))


def _together(points: Sequence[TimelinePoint]) -> TimelinePoint:
    return TimelinePoint(
        at=points[0].at,
        seconds=math.fsum(point.seconds for point in points),
        prefill_rows=sum(point.prefill_rows for point in points),
        decode_rows=sum(point.decode_rows for point in points),
        sequences=max(point.sequences for point in points),
    )


def write_record(suite_path: Path, record: SweepRecord) -> Path:
    """Write `flexgen_sweep.json` into a suite's directory, made if need be; whole or not at all. Returns its path.

    Raises `OSError` where the file cannot be written, `ValueError` for a number that is not finite.
    """
    suite_path.mkdir(parents=True, exist_ok=True)
    path = suite_path / FILE_NAME
    replace_text(path, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")
    return path


def replace_text(path: Path, text: str) -> None:
    """Let `path` hold `text`, which takes effect at once or not at all; raises `OSError`."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def read_record(suite_path: Path) -> SweepRecord | None:
    """The record in a suite's directory; None where there is none, `ConfigError` where it is not one."""
    path = suite_path / FILE_NAME
    if not find_file(path, ConfigError):
        return None
    content = read_bytes(path, ConfigError, limit=MAX_JSON_BYTES)
    try:
        found = json.loads(content)  # halves of surrogate pairs included, which names of runs may have
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); remove it, or run the sweep again") from None
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise ConfigError(f"{path} has version {version!r}, this flexgen-helm reads {VERSION}; run the sweep again")
    try:
        record: SweepRecord = _decode(SweepRecord, found, "")
        for moment in (record.started, record.finished):
            if moment is not None and datetime.fromisoformat(moment).tzinfo is None:
                raise ValueError(f"{moment!r} has no time zone")
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{path} is no record of a sweep: {error}; remove it, or run the sweep again") from None
    return record


def _decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, as JSON has it, as what the annotation `kind` says; `ValueError` where it is not that."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None:
            return None
        (kind,) = (each for each in arguments if each is not type(None))
        return _decode(kind, value, where)
    if is_dataclass(kind):
        return _decode_fields(kind, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} is {value!r}, none of {', '.join(arguments)}")
        return value
    if origin is tuple:
        return tuple(
            _decode(arguments[0], each, f"{where}[{at}]") for at, each in enumerate(_expect(list, value, where))
        )
    if origin is Mapping:
        pairs = _expect(dict, value, where).items()
        return {
            key: each if arguments[1] is Any else _decode(arguments[1], each, f"{where}.{key}") for key, each in pairs
        }
    if kind is float:
        if not math.isfinite(_expect((int, float), value, where)):
            raise ValueError(f"{where} is {value}")
        return float(value)
    return _expect(kind, value, where)


def _decode_fields(kind: Any, value: Any, where: str) -> Any:
    hints, given = get_type_hints(kind), _expect(dict, value, where or "the file")
    names = [each.name for each in fields(kind)]
    inside = f"{where}." if where else ""
    optional = {each.name for each in fields(kind) if each.metadata.get("may be missing")}
    for name in names:
        if name not in given and name not in optional:
            raise ValueError(f"{inside}{name} is missing")
    for name in given:
        if name not in names:
            raise ValueError(f"{inside}{name} is unknown")
    return kind(**{name: _decode(hints[name], given[name], f"{inside}{name}") for name in names if name in given})


def _expect(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} is {str(value)[:40]!r} where a {_NAMES[kind]} is expected")
    return value


_NAMES: dict[Any, str] = {str: "text", int: "whole number", (int, float): "number", list: "list", dict: "mapping"}
