"""Compares a run with its repetition: requests, answers, log-probabilities, statistics and score."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.reading import read_bytes
from flexgen_helm.fidelity.verdict import TOLERANCES
from flexgen_helm.helm.completed import MOST_BYTES
from flexgen_helm.helm.records.provenance import Provenance
from flexgen_helm.helm.scores import choose, recorded_main_metric

MOST_DIFFERENCES = 20
"""The most differing answers, and names of differing statistics, that are reported."""
_TIMES = ("runtime", "batch_size")
"""Parts of names of statistics that measure time, not results."""


@dataclass(frozen=True, kw_only=True)
class Count:
    """How many items are equal."""

    equal: int
    total: int
    differing: tuple[str, ...] = ()
    """The first ones that differ."""

    @property
    def is_whole(self) -> bool:
        """Whether all are equal."""
        return self.equal == self.total


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """The parts of a run that were reproduced."""

    run: str
    requests: Count
    """The requests in order: they depend on the data, HELM's adapters and the tokenizer."""
    answers: Count
    """Texts, tokens and finish reasons of equal requests."""
    logprobs: Count
    """The bit-equal log-probabilities, among the tokens of equal answers."""
    largest_difference: float
    """The largest difference of a log-probability, in nats; 0 where all are equal."""
    tolerance: float
    """The largest difference that rounding explains: the order of sums depends on the other requests of a batch."""
    statistics: Count
    """HELM's statistics, except times; equal up to `tolerance`, which scales with values above 1."""
    metric: str
    before: float | None
    """The score, by the run's main metric."""
    after: float | None

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs by more than rounding explains."""
        counts = (self.requests, self.answers, self.statistics)
        return all(each.is_whole for each in counts) and self.largest_difference <= self.tolerance

    def as_mapping(self) -> dict[str, Any]:
        """The comparison as JSON."""
        return {"equal": self.is_equal, **asdict(self)}


def tolerance_of(found: Provenance, again: Provenance) -> float:
    """Return the largest difference of a log-probability that rounding explains between two runs, by their records."""
    is_same = (found.hardware.device, found.versions, found.identity) == (
        again.hardware.device,
        again.versions,
        again.identity,
    )
    if is_same and found.policy.get("batch-invariant"):
        return 0.0
    return TOLERANCES[str(found.identity["dtype"])]


def reproduction_of(before: Path, after: Path, tolerance: float) -> Reproduction:
    """Compare the files of two runs of one run spec; `ConfigError` if HELM cannot have written one of them."""
    try:
        return _compare(before, after, tolerance)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"the files of {before} are not as HELM writes them ({reason})") from None


def _compare(before: Path, after: Path, tolerance: float) -> Reproduction:
    ours, theirs = (_load(path / "scenario_state.json").get("request_states", []) for path in (before, after))
    same, odd = _same_requests(ours, theirs)
    answers, pairs = _answers(same)
    told, again = (_statistics(_load(path / "stats.json")) for path in (before, after))
    spec = _load(before / "run_spec.json")
    metric, scores = _scores(spec, before, after)
    return Reproduction(
        run=str(spec["name"]),
        requests=Count(equal=len(same), total=max(len(ours), len(theirs)), differing=_first(odd)),
        answers=answers,
        logprobs=Count(equal=sum(one == two for one, two in pairs), total=len(pairs)),
        largest_difference=max((_distance(one, two) for one, two in pairs), default=0.0),
        tolerance=tolerance,
        statistics=_same_statistics(told, again, tolerance),
        metric=metric,
        before=scores[0],
        after=scores[1],
    )


def _load(path: Path) -> Any:
    content = read_bytes(path, ConfigError, limit=MOST_BYTES)
    try:
        return json.loads(content)  # as written by HELM, including lone surrogates
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _first(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(names[:MOST_DIFFERENCES])


_Pair = tuple[Mapping[str, Any], Mapping[str, Any]]


def _same_requests(ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[list[_Pair], list[str]]:
    """Pair the states at the same position with the same request; also returns the positions without a pair."""
    same: list[_Pair] = []
    odd: list[str] = []
    for place, (one, two) in enumerate(zip_longest(ours, theirs)):
        if one is not None and two is not None and one.get("request") == two.get("request"):
            same.append((one, two))
        else:
            odd.append(f"request {place + 1} ({_instance(one or two)})")
    return same, odd


def _instance(state: Mapping[str, Any]) -> str:
    return f"instance {state.get('instance', {}).get('id')}"


def _answers(same: Sequence[_Pair]) -> tuple[Count, list[tuple[float, float]]]:
    """The number of equal answers, and their log-probabilities."""
    pairs: list[tuple[float, float]] = []
    odd: list[str] = []
    for one, two in same:
        told, again = (_said(each.get("result") or {}) for each in (one, two))
        if told == again:
            pairs += zip(*(_logprobs(each.get("result") or {}) for each in (one, two)), strict=True)
        else:
            odd.append(f"{_instance(one)}: {_shown(told, again)}")
    return Count(equal=len(same) - len(odd), total=len(same), differing=_first(odd)), pairs


def _said(result: Mapping[str, Any]) -> list[Any]:
    """What an answer says: whether there is one, and of each completion text, tokens, why it ended and its thinking."""
    return [
        result.get("success"),
        *(
            (
                each.get("text"),
                [token.get("text") for token in each.get("tokens", ())],
                each.get("finish_reason"),
                each.get("thinking"),
            )
            for each in result.get("completions", ())
        ),
    ]


def _shown(one: Sequence[Any], two: Sequence[Any]) -> str:
    """A short description of where two answers differ."""
    if one[0] != two[0]:
        return "answered then, not now" if one[0] else "answered now, not then"
    for ours, theirs in zip(one[1:], two[1:], strict=False):
        if ours != theirs:
            what = "texts" if ours[0] != theirs[0] else "tokens"
            return f"{what} {_short(ours[0])} and {_short(theirs[0])}"
    return f"{len(one) - 1} and {len(two) - 1} completions"


def _short(text: Any) -> str:
    return repr(text if len(str(text)) <= 40 else f"{str(text)[:40]}…")


def _logprobs(result: Mapping[str, Any]) -> list[float]:
    return [
        float(token.get("logprob", 0.0)) for each in result.get("completions", ()) for token in each.get("tokens", ())
    ]


def _distance(one: float, two: float) -> float:
    """The distance of two numbers that may be infinite or None."""
    return 0.0 if one == two or (math.isnan(one) and math.isnan(two)) else _finite(abs(one - two))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _statistics(stats: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The statistics that count or measure answers, by HELM's name as JSON."""
    return {
        json.dumps(stat["name"], sort_keys=True): stat
        for stat in stats
        if not any(part in str(stat["name"].get("name")) for part in _TIMES)
    }


def _same_statistics(
    ours: Mapping[str, Mapping[str, Any]], theirs: Mapping[str, Mapping[str, Any]], tolerance: float
) -> Count:
    names = [*ours, *(name for name in theirs if name not in ours)]
    odd = [name for name in names if not _alike(ours.get(name), theirs.get(name), tolerance)]
    return Count(equal=len(names) - len(odd), total=len(names), differing=_first([_told(name) for name in odd]))


def _alike(one: Mapping[str, Any] | None, two: Mapping[str, Any] | None, tolerance: float) -> bool:
    if one is None or two is None or one.get("count") != two.get("count"):
        return False
    return all(
        math.isclose(one.get(key, 0.0), two.get(key, 0.0), rel_tol=tolerance, abs_tol=tolerance)
        for key in ("mean", "min", "max")
    )


def _told(name: str) -> str:
    parts = json.loads(name)
    return ", ".join(_parts(parts))


def _parts(name: Mapping[str, Any]) -> Iterator[str]:
    yield str(name["name"])
    for key, value in name.items():
        if key != "name":
            yield f"{key} {value.get('name', value) if isinstance(value, dict) else value}"


def _scores(spec: Mapping[str, Any], before: Path, after: Path) -> tuple[str, list[float | None]]:
    metric, split = recorded_main_metric(spec["scenario_spec"])
    model = str(spec["adapter_spec"].get("model"))
    found = [choose(_load(path / "stats.json"), str(spec["name"]), model, metric, split) for path in (before, after)]
    return f"{found[0].metric} ({found[0].split})", [each.value for each in found]
