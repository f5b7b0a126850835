"""A suite and a reference: scores of another suite, and the drift that `verify` found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from engine.reading import read_json
from flexgen_helm.fidelity.record import FILE_NAME
from flexgen_helm.suites.suite import Run, Suite, key_of, read_suite, score_like, without_model


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What `verify` found of a run: how far the engine is from plain transformers on the uncompressed weights."""

    run: str
    verdict: str
    compression: str
    """The compression, such as "weights in 4 bits"; empty where the policy compresses nothing."""
    largest_difference: float | None
    """The largest difference of a log-probability; `mean_difference` is of log-probabilities, too."""
    mean_difference: float | None
    tolerance: float | None
    agreeing_tokens: int
    compared_tokens: int
    score: float | None
    """The score of the verified sample, like the reference's."""
    reference_score: float | None

    @property
    def score_difference(self) -> float | None:
        """Ours less the reference's."""
        return None if self.score is None or self.reference_score is None else self.score - self.reference_score


def compression(policy: object) -> str:
    """What a policy rounds, in words; empty if nothing."""
    if not isinstance(policy, Mapping):
        return ""
    parts = []
    for key, what in (("compress-weight", "weights"), ("compress-cache", "cache")):
        if (bits := policy.get(key)) and bits != "lossless":
            parts.append(f"{what} in {4 if bits is True else bits} bits")
    return ", ".join(parts)


class References:
    """The source of a reference's scores: a suite of it, or the file of `verify`."""

    def __init__(self, path: Path | None, *, is_one_model: bool) -> None:
        self._is_one_model = is_one_model
        self._suite: Suite | None = None
        self._files: list[Drift] = []
        if path is not None and path.is_dir():
            self._suite = read_suite(path)
        elif path is not None:
            found = _read_drift(path)
            if found is None:
                raise ConfigError(f"{path} is neither a suite's directory nor a fidelity.json of `flexgen-helm verify`")
            self._files.append(found)

    def drift(self, run: Run) -> Drift | None:
        """What `verify` wrote of the run: in its own directory, in the reference suite's, or in the file given."""
        for found in self._files:
            key = key_of(found.run)
            if key == run.key or (self._is_one_model and without_model(key) == without_model(run.key)):
                return found
        if self._suite is not None and (other := self._suite.counterpart(run, any_model=True)) is not None:
            found_there = _read_drift(other.path / FILE_NAME)
            if found_there is not None:
                return found_there
        return _read_drift(run.path / FILE_NAME)

    def score(self, run: Run, drift: Drift | None) -> tuple[float | None, float | None]:
        """The reference's score of the run, and how much ours is above it."""
        other = self._suite.counterpart(run, any_model=True) if self._suite else None
        if other is not None and run.score is not None and not (other.path / FILE_NAME).is_file():
            value = score_like(run, other.path.parent, name=other.name)
            if value is not None:
                return value, None if run.value is None else run.value - value
        return (drift.reference_score, drift.score_difference) if drift else (None, None)


def _read_drift(path: Path) -> Drift | None:
    """A `fidelity.json`; None where there is none or it is something else."""
    try:
        found = read_json(path, ConfigError)
        logprobs, tokens, score = found["logprobs"], found["tokens"], found["score"]
        return Drift(
            run=str(found["run"]),
            verdict=str(found["verdict"]),
            compression=compression(found.get("policy")),
            largest_difference=_number(logprobs["largest_difference"]),
            mean_difference=_number(logprobs["mean_difference"]),
            tolerance=_number(logprobs["tolerance"]),
            agreeing_tokens=int(tokens["agreeing"]),
            compared_tokens=int(tokens["compared"]),
            score=_number(score["ours"]),
            reference_score=_number(score["reference"]),
        )
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _number(value: object) -> float | None:
    return None if value is None else float(value)  # type: ignore[arg-type]
