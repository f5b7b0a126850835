"""Whether two scores differ by more than chance: the bootstrap over instances, and Holm's correction for many scores.

A score is a ratio of sums over instances (a mean has their number below the line), or the exponential of one. Instances
are drawn with replacement, each with all its trials and windows.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FEWEST_SAMPLES, MOST_SAMPLES = 10_000, 50_000
"""The numbers of resamples: more for more scores, for which Holm's correction needs smaller p-values; the most
suffice for 1250 scores at 95 %."""
ROUNDING = 1e-4
"""A score that differs by no more than this (times its size, where that is above 1) has not changed."""
_TINY = 1e-12
_CHUNK = 2_000_000
"""Numbers drawn at a time."""

Sums = Mapping[str, tuple[float, float]]
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """A difference of scores (the second less the first), with the effect of chance."""

    difference: float
    low: float
    high: float
    """The upper end of the interval that contains the resampled difference with the requested confidence."""
    p_value: float
    """Two-sided: how often chance alone would make a difference like this."""
    is_paired: bool
    num_changed: int
    """Instances whose values differ, where they are paired."""
    samples: Array
    """Resampled differences."""


class Mean:
    """The difference of the mean of several scores, each run's instances resampled apart."""

    def __init__(self) -> None:
        self._samples: Array = np.zeros(1)
        self._differences: list[float] = []
        self._num_changed = 0
        self._is_paired = True

    def add(self, noise: Noise) -> None:
        """Count one more score; all have equally many samples."""
        self._samples = self._samples + noise.samples
        self._differences.append(noise.difference)
        self._num_changed += noise.num_changed
        self._is_paired &= noise.is_paired

    def noise(self, confidence: float) -> Noise:
        """Return the noise of the mean of all scores that were added."""
        count = len(self._differences)
        least = _least_sign_test(self._num_changed) if self._is_paired else 0.0
        noise = _noise(self._samples / count, math.fsum(self._differences) / count, confidence, least)
        return replace(noise, is_paired=self._is_paired, num_changed=self._num_changed)


def num_samples(num_scores: int, confidence: float) -> int:
    """Enough resamples for the smallest p-value that Holm's correction needs for so many scores."""
    return min(MOST_SAMPLES, max(FEWEST_SAMPLES, math.ceil(20 * num_scores / (1 - confidence))))


def compare_scores(
    before: Sums, after: Sums, *, name: str, confidence: float, samples: int, is_exponential: bool = False
) -> Noise:
    """Bootstrap the difference of two scores; paired if both have the same instances.

    `name` seeds the draws, so that a result depends only on its run. A p-value is never below the minimum of a sign
    test of the changed instances (paired), or of a permutation test of the two groups: with few instances, a bootstrap
    underestimates p-values.
    """
    generator = np.random.default_rng(zlib.crc32(name.encode("utf-8", errors="replace")))
    observed = _of(after, is_exponential) - _of(before, is_exponential)
    if before.keys() != after.keys():
        least = 2 * math.exp(-_log_choices(len(before) + len(after), len(before)))
        first, second = (
            _resample(np.array([each[instance] for instance in sorted(each)]), samples, generator)
            for each in (before, after)
        )
        drawn = _score(second, is_exponential) - _score(first, is_exponential)
        return _noise(drawn, observed, confidence, least)
    rows = np.array([(*before[instance], *after[instance]) for instance in sorted(before)])
    changed = int(np.sum(np.any(np.abs(rows[:, :2] - rows[:, 2:]) > _TINY, axis=1)))
    drawn = np.zeros(samples)
    if changed:
        sums = _resample(rows, samples, generator)
        drawn = _score(sums[:, 2:], is_exponential) - _score(sums[:, :2], is_exponential)
    noise = _noise(drawn, observed, confidence, _least_sign_test(changed))
    return replace(noise, is_paired=True, num_changed=changed)


def whole_score_p_value(difference: float, num_before: int, num_after: int) -> float:
    """A p-value for a score without values per instance: as if it were a fraction of right answers, with most noise."""
    if not num_before or not num_after:
        return 0.0 if difference else 1.0
    deviation = 0.5 * math.sqrt(1 / num_before + 1 / num_after)
    return math.erfc(abs(difference) / deviation / math.sqrt(2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values: rejecting those below alpha makes any error with probability at most alpha."""
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = highest
    return adjusted


def is_rounding(before: float, after: float) -> bool:
    """Whether two scores are equal up to rounding."""
    return abs(after - before) <= ROUNDING * max(1.0, abs(before))


def _noise(drawn: Array, observed: float, confidence: float, least: float) -> Noise:
    """The noise of unpaired samples; no p-value is below `least`."""
    tail = min(int(np.sum(drawn <= _TINY)), int(np.sum(drawn >= -_TINY)))
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Noise(
        difference=observed,
        low=float(low),
        high=float(high),
        p_value=min(1.0, max(2 * (1 + tail) / (len(drawn) + 1), least)),
        is_paired=False,
        num_changed=0,
        samples=drawn,
    )


def _least_sign_test(num_changed: int) -> float:
    """The smallest p-value of a two-sided sign test."""
    return min(1.0, 2.0 ** (1 - num_changed))


def _resample(rows: Array, samples: int, generator: np.random.Generator) -> Array:
    """Sums over as many rows as there are, drawn with replacement, `samples` times.

    The number of draws of each distinct row is multinomial, so scores that are right or wrong cost very little.
    """
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    shares = counts / counts.sum()
    at_a_time = max(1, _CHUNK // len(distinct))
    parts = [
        generator.multinomial(len(rows), shares, size=min(at_a_time, samples - start)) @ distinct
        for start in range(0, samples, at_a_time)
    ]
    return np.concatenate(parts)


def _score(sums: Array, is_exponential: bool) -> Array:
    ratio: Array = sums[:, 0] / sums[:, 1]
    return np.exp(ratio) if is_exponential else ratio


def _of(sums: Sums, is_exponential: bool) -> float:
    ratio = math.fsum(above for above, _ in sums.values()) / math.fsum(below for _, below in sums.values())
    return math.exp(ratio) if is_exponential else ratio


def _log_choices(number: int, of: int) -> float:
    return math.lgamma(number + 1) - math.lgamma(of + 1) - math.lgamma(number - of + 1)
