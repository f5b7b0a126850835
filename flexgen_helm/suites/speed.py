"""The speed of models, and whether one became slower: on the same hardware, with the same work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from flexgen_helm.planning.environment import Hardware
from flexgen_helm.sweeps.record import ModelRecord, SweepRecord

ALIKE = 0.01
"""Counts of work and bytes of memory that differ by no more than this share are the same."""

Verdict = Literal["same", "slower", "faster", "not compared"]


@dataclass(frozen=True, kw_only=True)
class SpeedChange:
    """One model in both suites; tokens are those of prompts, as requested, and new ones."""

    deployment: str
    verdict: Verdict
    before: float | None = None
    """Tokens per second, loading included."""
    after: float | None = None
    seconds_before: float | None = None
    seconds_after: float | None = None
    reason: str = ""
    """Why it is not compared, or what else has changed."""

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self.deployment

    @property
    def change(self) -> float | None:
        """The growth of tokens per second, as a fraction."""
        return self.after / self.before - 1 if self.before and self.after is not None else None

    @property
    def is_failure(self) -> bool:
        """Whether it fails the gate."""
        return self.verdict == "slower"


def tokens_per_second(model: ModelRecord) -> float | None:
    """The tokens of prompts, as requested, and new ones per second; None where nothing was computed."""
    if not model.computed or model.seconds <= 0:
        return None
    return (model.prompt_tokens + model.new_tokens) / model.seconds


def difference_of(before: SweepRecord, after: SweepRecord, deployment: str) -> str | None:
    """Why a model's speeds in two suites cannot be compared; None if they can."""
    first, second = (
        next((each for each in record.models if each.deployment == deployment), None) for record in (before, after)
    )
    if first is None or second is None:
        return "not in the other suite"
    if not same_hardware(before.hardware, after.hardware):
        return f"other hardware: {_told(before.hardware)} before, {_told(after.hardware)} now"
    for model, when in ((first, "before"), (second, "now")):
        if tokens_per_second(model) is None:
            return f"nothing was computed {when}: HELM's cache answered"
    for name in ("computed", "prompt_tokens"):
        counts = getattr(first, name), getattr(second, name)
        if not _alike(*counts):
            what = "requests computed" if name == "computed" else "prompt tokens"
            return f"other work: {counts[0]} {what} before, {counts[1]} now"
    return None


def same_hardware(one: Hardware, other: Hardware) -> bool:
    """Whether two machines are of one kind; their names do not matter."""
    return (
        (one.device, one.cores) == (other.device, other.cores)
        and _alike(one.device_memory_bytes or 0, other.device_memory_bytes or 0)
        and _alike(one.host_memory_bytes, other.host_memory_bytes)
    )


def compare_speed(before: SweepRecord | None, after: SweepRecord | None, slowdown: float) -> Iterator[SpeedChange]:
    """Each model of the second suite; also those that are in the first only."""
    if before is None or after is None:
        return
    olds, news = ({each.deployment: each for each in record.models} for record in (before, after))
    for deployment in sorted({*olds, *news}):
        old, new = olds.get(deployment), news.get(deployment)
        speeds = tokens_per_second(old) if old else None, tokens_per_second(new) if new else None
        reason = difference_of(before, after, deployment)
        verdict: Verdict = "same"
        if reason is not None:
            verdict = "not compared"
        elif is_slower(speeds[0], speeds[1], slowdown):
            verdict = "slower"
        elif is_slower(speeds[1], speeds[0], slowdown):
            verdict = "faster"
        if reason is None and old and new and old.policy != new.policy:
            reason = "another policy"
        yield SpeedChange(
            deployment=deployment,
            verdict=verdict,
            before=speeds[0],
            after=speeds[1],
            seconds_before=old.seconds if old else None,
            seconds_after=new.seconds if new else None,
            reason=reason or "",
        )


def is_slower(before: float | None, after: float | None, slowdown: float) -> bool:
    """Whether the second speed is below the first by more than the share `slowdown`."""
    return before is not None and after is not None and after < before * (1 - slowdown) * (1 - 1e-12)


def _alike(one: float, other: float) -> bool:
    return abs(one - other) <= ALIKE * max(abs(one), abs(other))


def _told(hardware: Hardware) -> str:
    memory = f" with {hardware.device_memory_bytes / 1e9:.0f} GB" if hardware.device_memory_bytes else ""
    return f"{hardware.device}{memory}, {hardware.cores} cores, {hardware.host_memory_bytes / 1e9:.0f} GB"
