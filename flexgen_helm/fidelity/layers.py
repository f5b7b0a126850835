"""The oracle of `verify` for models of any size: stock layers of transformers against the engine's, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from engine.job import Completion, Job
from flexgen_helm.fidelity.oracle import Forced
from flexgen_helm.terminal.columns import columns

if TYPE_CHECKING:
    from engine.verification.difference import StageDifference
    from engine.verification.layerwise import Findings
    from engine.verification.scored import Scored

ComparesLayers = Callable[[Sequence[Job], Sequence[Completion], Callable[[int, int], None]], "Findings"]
"""`Engine.compare_with_stock`."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What the comparison layer by layer found for the runs of one model."""

    model: str
    reason: str
    """Why the reference is not the whole model."""
    dtype: str
    findings: Findings
    alike: float | None
    """The largest difference of a log-probability from stock layers that compute with the engine's own weights, as they
    are decoded, and round keys and values as its cache does; None where there is none to compare."""

    @property
    def worst(self) -> StageDifference:
        """The first stage at fault, else the one with the largest difference relative to its scale."""
        at_fault = (stage for stage in self.findings.stages if not stage.is_within)
        return next(at_fault, max(self.findings.stages, key=lambda stage: stage.relative))

    @property
    def has_drifted(self) -> bool:
        """Whether any stage differs by more than rounding explains, or has other weights than the checkpoint."""
        return not self.worst.is_within

    @property
    def is_encoded(self) -> bool:
        """Whether the log-probabilities of the runs are compared with those of uncompressed weights and cache."""
        return self.findings.unencoded is not None

    def figures(self) -> dict[str, Any]:
        """The entry in `fidelity.json`; JSON types only."""
        found = self.findings
        return {
            "reason": self.reason,
            "attention": found.attention,
            "tolerance": found.tolerance,
            "passes": found.num_passes,
            "weights_compared": found.has_compared_weights,
            "largest_logprob_difference_with_the_same_codes": self.alike if self.is_encoded else None,
            "worst": self.worst.name,
            "stages": [{**asdict(stage), "is_within": stage.is_within} for stage in found.stages],
        }

    def told(self) -> str:
        """The table by layer, with a description of the comparison."""
        found, lines = self.findings, [f"{self.model}, layer by layer, since {self.reason}:", self._table()]
        lines.append(
            "Each stage computes the same input both ways, with the weights of the same slot: our micro-batches, and "
            f"transformers' own layer with {found.attention} attention on each text by itself."
        )
        if not found.has_compared_weights:
            lines.append("The weights are not compared with a checkpoint: they come from none.")
        if self.is_encoded and self.alike is not None:
            lines.append(
                f"With the same codes log-probabilities differ by up to {self.alike:.1e}; those of the table of runs "
                "are compared with the checkpoint's own weights and a cache without codes."
            )
        return "\n".join(lines)

    def drift(self) -> str:
        """What rounding does not explain, with the numbers."""
        stage = self.worst
        others = sum(not each.is_within for each in self.findings.stages) - 1
        more = f"; so do {others} other stages" if others else ""
        if stage.weights is not None and stage.weights.is_wrong:
            return (
                f"drift in {stage.name} of {self.model}: its weights are not the checkpoint's, "
                f"{stage.weights.parameter} by up to {stage.weights.largest:.2g}{more}"
            )
        kinds = [each for each in stage.kinds if each.num_beyond]
        rows = " and ".join(f"{each.num_beyond} of {each.num_rows} {each.name} rows" for each in kinds)
        return (
            f"drift in {stage.name} of {self.model}: "
            f"{rows or f'{stage.num_beyond} of {stage.num_rows} rows'} differ from stock "
            f"{self.findings.attention} attention, by up to {stage.relative:.2g} of their scale (limit "
            f"{self.findings.tolerance:g} in {self.dtype}), {stage.largest:.2g} in numbers{more}"
        )

    def verdict(self) -> str:
        """The finding in one line, where there is no drift."""
        stages = self.findings.stages
        stage = max(stages, key=lambda stage: stage.relative_within)
        excused = [each for each in stages if each.num_excused]
        bound = "rounding explains" if excused else "rounding"
        told = (
            f"no layer of {self.model} differs from stock {self.findings.attention} attention by more than {bound}: "
            f"{stage.name} does most, by {stage.relative_within:.1e} of its scale (limit "
            f"{self.findings.tolerance:g} in {self.dtype})"
        )
        if not excused:
            return told
        most, count = max(excused, key=lambda stage: stage.relative), sum(each.num_excused for each in excused)
        return (
            f"{told}, but for {count} of {sum(each.num_rows for each in excused)} rows of "
            f"{', '.join(each.name for each in excused)}, by up to {most.relative:.1e} in {most.name}: these are "
            "tolerated, because rounding sends a few rows to other experts where scores nearly tie"
        )

    def _table(self) -> str:
        rows = [("stage", "largest", "of its scale", "rows", "beyond", "weights", "codes cost")]
        for stage in self.findings.stages:
            weights, cost = stage.weights, stage.compression
            rows.append(
                (
                    stage.name,
                    f"{stage.largest:.1e}",
                    f"{stage.relative:.1e}",
                    str(stage.num_rows),
                    str(stage.num_beyond),
                    "none" if weights is None else "wrong" if weights.is_wrong else f"{weights.largest:.1e}",
                    "none" if cost is None else f"{cost:.1e}",
                )
            )
        return columns(rows, 1)


class LayerwiseReference:
    """Log-probabilities of stock layers for the tokens that our engine chose; it decodes none of its own."""

    decodes = False

    def __init__(self, jobs: Sequence[Job], findings: Findings) -> None:
        """`findings` are of all `jobs`, in their order."""
        scored = findings.scored if findings.unencoded is None else findings.unencoded
        self._scored: Mapping[str, Scored] = {repr(job): each for job, each in zip(jobs, scored, strict=True)}

    def force(self, job: Job, tokens: Sequence[int]) -> Forced:
        """Return the results for the tokens of our completion; there are no others."""
        found = self._scored[repr(job)]
        assert len(tokens) == len(found.logprobs)
        return Forced(prompt_logprobs=found.prompt_logprobs, logprobs=found.logprobs, margins=found.margins)

    def greedy(self, job: Job, ours: Completion) -> Completion:
        """Return our completion if every token is its choice too; else the tokens up to its first different choice."""
        chosen = self._scored[repr(job)].greedy
        expected = ours.tokens if ours.end_token is None else (*ours.tokens, ours.end_token)
        pairs = enumerate(zip(chosen, expected, strict=False))
        parting = next((place for place, (its, mine) in pairs if its != mine), None)
        if parting is None:
            return Completion(text=ours.text, tokens=ours.tokens, finish_reason=ours.finish_reason)
        return Completion(tokens=(*ours.tokens[:parting], chosen[parting]))


def compare_layers(
    model: str,
    reason: str,
    dtype: str,
    answers: Sequence[tuple[Job, Completion]],
    compare: ComparesLayers,
    progress: Callable[[int, int], None],
) -> tuple[Layers, LayerwiseReference]:
    """Compare all that was computed by one model, once each; `answers` are of jobs that did not fail."""
    distinct = {repr(job): (job, completion) for job, completion in answers}
    jobs = [job for job, _ in distinct.values()]
    findings = compare(jobs, [completion for _, completion in distinct.values()], progress)
    pairs = zip(distinct.values(), findings.scored, strict=True)
    apart = [size for (_, completion), scored in pairs for size in _differences(completion, scored)]
    layers = Layers(model=model, reason=reason, dtype=dtype, findings=findings, alike=max(apart, default=None))
    return layers, LayerwiseReference(jobs, findings)


def _differences(ours: Completion, scored: Scored) -> Iterator[float]:
    for mine, its in (
        *zip(ours.prompt_logprobs or (), scored.prompt_logprobs or (), strict=True),
        *zip(ours.logprobs, scored.logprobs, strict=True),
    ):
        if mine is not None and its is not None:
            yield abs(mine - its)
