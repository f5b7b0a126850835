"""Runs a small random copy of a model in the engine under several policies, and compares with plain transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError, named
from flexgen_helm.checking.jobs import (
    JOBS,
    LONGEST,
    REACH,
    TOLERANCE,
    Expected,
    contradictions,
    differences,
    expect,
    reach,
)
from flexgen_helm.checking.left_out import left_out
from flexgen_helm.checking.packed_copy import pack_copy
from flexgen_helm.checking.plain import load_reference
from flexgen_helm.checking.random_model import save_small
from flexgen_helm.checking.shrinking import small_config, with_small_encoders
from flexgen_helm.checking.undecided import UndecidedError, UnpackableError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

POLICIES: dict[str, dict[str, Any]] = {
    "all on the device": {"percent": [100, 0, 100, 0, 100, 0]},
    "thirds on device, host and disk": {"percent": [34, 33, 34, 33, 34, 33]},
    "two at a time, padded": {
        "percent": [50, 50, 50, 50, 50, 50],
        "gpu-batch-size": 2,
        "num-gpu-batches": 2,
        "pad-to-seq-len": "bucket",
    },
}
"""They cover all differences that a family's code can notice: parameters bound once or passing through slots, keys
and values on every tier, batches of several kinds, several sweeps, padding."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of the jobs under one policy."""

    policy: str
    jobs: int
    differing: int
    largest: float
    """The largest difference of log-probabilities of equal tokens (natural logs)."""
    first: tuple[str, ...]
    """The first differences, in words."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of a model's small copy."""

    num_layers: int
    parameters: int
    packed: str | None
    """The format of the copy's matrices; None for plain numbers."""
    reach: float
    """The largest change of later log-probabilities by a prompt's first token."""
    runs: tuple[Run, ...]
    open_questions: tuple[str, ...]
    """Why agreement of the copy does not prove that the model agrees."""

    @property
    def verdict(self) -> str:
        """One of "equal", "different" and "undecided"."""
        if any(run.differing for run in self.runs):
            return "different"
        return "undecided" if self.open_questions else "equal"

    @property
    def largest(self) -> float:
        """The largest difference of a log-probability under any policy."""
        return max(run.largest for run in self.runs)

    def mapping(self) -> dict[str, Any]:
        """The trial as JSON."""
        return {**asdict(self), "verdict": self.verdict, "tolerance": TOLERANCE}


def try_copy(full: PreTrainedConfig, changes: Mapping[str, Any], packed: Mapping[str, Any] | None = None) -> Trial:
    """Shrink `full`, with `changes` of it as they are, and compare the engine with plain transformers, on the CPU.

    packed: the quantization_config of a model that comes quantized; its copy is packed, too, where that can be. Raises
    `UndecidedError` where there is nothing to compare.
    """
    try:
        return _tried(full, changes, packed)
    except UnpackableError as error:
        trial = _tried(full, changes, None)
        question = f"{error}; the copy's weights are plain numbers, and `flexgen-helm verify` compares the model's"
        return replace(trial, open_questions=(*trial.open_questions, question))


def _tried(full: PreTrainedConfig, changes: Mapping[str, Any], packed: Mapping[str, Any] | None) -> Trial:
    from engine.kernels.threads import one_thread

    small = small_config(full, changes)
    questions = left_out(full, small, LONGEST)
    with tempfile.TemporaryDirectory(prefix="flexgen-check-") as folder, one_thread():
        directory = save_small(Path(folder) / "model", with_small_encoders(small))
        if packed is not None:
            questions += pack_copy(directory, packed)
        try:
            reference = load_reference(directory)
        except Exception as error:  # of a format's library that is not there, or of what it makes of a copy
            if packed is None:
                raise
            raise UnpackableError(f"plain transformers cannot compute such a copy here: {named(error)}") from None
        try:
            expected, moved = expect(reference), reach(reference)
            contradicted = contradictions(reference, expected)
        except Exception as error:  # of the family's own code at sizes it does not expect
            raise UndecidedError(
                f"{small.model_type}, shrunk, does not run in plain transformers: {named(error)}"
            ) from None
        if contradicted:
            raise UndecidedError(
                f"plain transformers contradicts itself, so there is nothing to compare with: for {contradicted} of "
                f"{len(expected)} prompts, generate gives other tokens than the greedy ones of the forward"
            )
        if moved <= REACH:
            questions.append(
                f"the beginning of a prompt moves log-probabilities of the copy by {moved:.1g} at most, too little for "
                "agreement to say anything of attention"
            )
        runs = tuple(_run(directory, name, Path(folder) / "offload", expected) for name in POLICIES)
        return Trial(
            num_layers=int(getattr(small.get_text_config(), "num_hidden_layers", 0)),
            parameters=int(reference.num_parameters()),
            packed=None if packed is None else str(packed.get("quant_method")),
            reach=moved,
            runs=runs,
            open_questions=tuple(questions),
        )


def _run(directory: Path, policy: str, offload: Path, expected: list[Expected]) -> Run:
    from engine.engine import Engine

    settings = {"device": "cpu", "offload-dir": str(offload), **POLICIES[policy]}
    try:
        with Engine.from_pretrained(str(directory), policy=settings) as engine:
            done = engine.run(JOBS)
    except EngineError as error:
        raise UndecidedError(f"the engine runs the model's family, but not its copy: {error}") from None
    found, largest = differences(expected, done)
    return Run(policy=policy, jobs=len(done), differing=len(found), largest=largest, first=tuple(found[:3]))
