"""The summary of a comparison: its figures, whether rounding explains the differences, and the table of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flexgen_helm.fidelity.comparison import Comparison, Difference
from flexgen_helm.fidelity.layers import Layers
from flexgen_helm.helm.scores import Score, short_name
from flexgen_helm.terminal.columns import columns

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}
"""The largest difference of a log-probability that is attributed to rounding, by dtype: sums have another order here.

This is a limit, not a law: in 16 bits, models with large logits round by more, especially in bfloat16.
"""
NUM_WORST = 5


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """The summary of a run's comparison with the reference."""

    comparison: Comparison
    score: Score
    """Our score, as computed by HELM."""
    reference_score: float | None
    """The same metric of the reference's results; None where it is not defined (sampled requests)."""
    dtype: str
    layers: Layers | None = None
    """The comparison layer by layer, of all runs of the model; None where the reference is the whole model."""

    @property
    def tolerance(self) -> float:
        """Largest difference of a log-probability that rounding explains."""
        return TOLERANCES[self.dtype]

    @property
    def is_sampled(self) -> bool:
        """Whether any request is sampled."""
        return any(each.is_sampled for each in self.comparison.compared)

    @property
    def score_difference(self) -> float | None:
        """Ours minus the reference's."""
        if self.score.value is None or self.reference_score is None:
            return None
        return self.score.value - self.reference_score

    @property
    def worst(self) -> list[Difference]:
        """The largest differences, one of each request and completion, largest first."""
        found = [each.worst for each in self.comparison.compared if each.worst is not None]
        return sorted(found, key=lambda each: -each.size)

    @property
    def largest_difference(self) -> float | None:
        """The largest difference of a log-probability; None where there are none."""
        return self.worst[0].size if self.worst else None

    @property
    def mean_difference(self) -> float | None:
        """The mean difference of log-probabilities; None where there are none."""
        count = self.num_logprobs
        return math.fsum(each.sum_of_differences for each in self.comparison.compared) / count if count else None

    @property
    def num_logprobs(self) -> int:
        """The number of compared log-probabilities."""
        return sum(each.num_logprobs for each in self.comparison.compared)

    @property
    def tokens(self) -> tuple[int, int]:
        """Greedy tokens before the first that differs, of how many."""
        compared = self.comparison.compared
        return sum(each.num_agreeing for each in compared), sum(each.num_tokens for each in compared)

    @property
    def texts(self) -> tuple[int, int]:
        """Greedy completions with identical text, of how many."""
        told = [each.same_text for each in self.comparison.compared if each.same_text is not None]
        return sum(told), len(told)

    @property
    def num_unexplained(self) -> int:
        """Divergent completions at whose first differing token the reference is not near a tie.

        Rounding may move each of two log-probabilities by the tolerance, so a tie is near within twice that.
        """
        return sum(each.margin > 2 * self.tolerance for each in self.comparison.compared)

    @property
    def differs(self) -> bool:
        """Whether answers differ by more than rounding explains."""
        differs = (self.largest_difference or 0.0) > self.tolerance or self.num_unexplained > 0
        return differs or self.comparison.num_failed_here > 0

    @property
    def has_drifted(self) -> bool:
        """Whether answers or a layer differ by more than rounding explains."""
        return self.differs or (self.layers is not None and self.layers.has_drifted)

    @property
    def verdict(self) -> str:
        """The finding in a few words."""
        if self.has_drifted:
            return "drift"
        return "within rounding" if self.num_logprobs else "nothing compared"

    def figures(self) -> dict[str, Any]:
        """The entry in `fidelity.json`; JSON types only."""
        agreeing, num_tokens = self.tokens
        same, num_texts = self.texts
        return {
            "verdict": self.verdict,
            "score": {
                "metric": self.score.metric,
                "split": self.score.split,
                "ours": self.score.value,
                "reference": self.reference_score,
                "difference": self.score_difference,
            },
            "sampled": self.is_sampled,
            "requests": {
                "compared": self.comparison.num_requests,
                "failed": self.comparison.num_failed,
                **(
                    {"failed_only_here": self.comparison.num_failed_here}
                    if self.layers is None
                    else {"told_up_to_the_first_difference": self.comparison.num_untold}
                ),
            },
            "logprobs": {
                "compared": self.num_logprobs,
                "largest_difference": self.largest_difference,
                "mean_difference": self.mean_difference,
                "tolerance": self.tolerance,
            },
            "tokens": {"agreeing": agreeing, "compared": num_tokens},
            "texts": {"identical": same, "compared": num_texts, "differing_unexplained": self.num_unexplained},
            "worst": [{**asdict(each), "difference": each.size} for each in self.worst[:NUM_WORST]],
            "layers": None if self.layers is None else self.layers.figures(),
        }

    def drift(self) -> str:
        """What rounding does not explain, with the numbers."""
        same, num_texts = self.texts
        parts = [f"log-probabilities by up to {self.largest_difference or 0.0:.2g}"]
        if num_texts > same:
            parts.append(
                f"{num_texts - same} of {num_texts} texts, {self.num_unexplained} of them where no tie is near"
            )
        if self.comparison.num_failed_here:
            parts.append(f"{self.comparison.num_failed_here} requests, which fail here only")
        if self.score_difference:
            parts.append(f"{self.score.metric} by {self.score_difference:+.3f}")
        return f"drift in {short_name(self.score.run)}: differing are {'; '.join(parts)}"


def verdict(fidelities: Sequence[Fidelity]) -> str:
    """Say whether all differences are within the limits for rounding; a line for each run where they are not."""
    by_layer = list({id(each.layers): each.layers for each in fidelities if each.layers is not None}.values())
    lines = [layers.drift() if layers.has_drifted else layers.verdict() for layers in by_layer]
    limits = sorted({f"{each.tolerance:g} in {each.dtype}" for each in fidelities})
    limits_told = f"the limits for rounding (log-probabilities: {', '.join(limits)})"
    if drifted := [each for each in fidelities if each.differs]:
        return "\n".join([*lines, *(each.drift() for each in drifted), f"more than {limits_told}"])
    num_failed = sum(each.comparison.num_failed for each in fidelities)
    failed = f"; {num_failed} requests failed here and count as empty answers" if num_failed else ""
    if not any(each.num_logprobs for each in fidelities):
        return "\n".join([*lines, f"nothing to compare: no request has log-probabilities{failed}"])
    found = f"the differences are within {limits_told}{failed}"
    is_clean = not any(layers.has_drifted for layers in by_layer)
    return "\n".join([*lines, f"no drift: {found}" if is_clean else f"of log-probabilities, {found}"])


def told_layers(fidelities: Sequence[Fidelity]) -> list[str]:
    """The findings of the layer-by-layer comparison, once for each model."""
    return [layers.told() for layers in {id(each.layers): each.layers for each in fidelities}.values() if layers]


def table(fidelities: Sequence[Fidelity]) -> str:
    """Lay the comparisons out in columns; if they are of one model, its name is in the header."""
    models = {each.score.model for each in fidelities}
    head = models.copy().pop() if len(models) == 1 else "run"
    rows = [
        (
            head,
            "metric",
            "score",
            "reference",
            "difference",
            "logprob max",
            "mean",
            "tokens",
            "texts",
            "requests",
            "failed",
        ),
        *(_row(each, short_name(each.score.run) if len(models) == 1 else each.score.run) for each in fidelities),
    ]
    return columns(rows, 2)


def _row(fidelity: Fidelity, name: str) -> tuple[str, ...]:
    score = "none" if fidelity.score.value is None else f"{fidelity.score.value:.3f}"
    if fidelity.is_sampled:
        reference = difference = "sampled"
    else:
        reference = "none" if fidelity.reference_score is None else f"{fidelity.reference_score:.3f}"
        difference = "none" if fidelity.score_difference is None else f"{fidelity.score_difference:+.3f}"
    logprobs = [
        "none" if each is None else f"{each:.1e}" for each in (fidelity.largest_difference, fidelity.mean_difference)
    ]
    counts = ["sampled" if fidelity.is_sampled and not of else f"{count}/{of}" if of else "none"
              for count, of in (fidelity.tokens, fidelity.texts)]  # fmt: skip
    requests = str(fidelity.comparison.num_requests), str(fidelity.comparison.num_failed)
    return (name, fidelity.score.metric, score, reference, difference, *logprobs, *counts, *requests)
