"""What a sweep prints at its end: short enough for a mail or a CI job, whatever the number of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import fsum
from pathlib import Path

from flexgen_helm.helm.scores import Score, short_name
from flexgen_helm.sweeps.record import ModelRecord, RunRecord, SweepRecord, counted
from flexgen_helm.terminal.progress import clock

MOST_FAILURES = 10
"""Failed runs that are named; the record names all."""
MOST_ROWS = 40
"""Most lines of scores; beyond that, runs of one scenario share a line."""


def summary(found: SweepRecord, scores: Sequence[Score], notes: Sequence[str], suite_path: Path) -> str:
    """Format counts, scores, what failed and why, speed, and where the results are."""
    counts = counted(run.status for run in found.runs)
    lines = [f"suite {found.suite}: " + ", ".join(f"{count} {status}" for status, count in counts.items())]
    lines += _table(scores, {run.name: run.failed_requests for run in found.runs})
    failed = [run for run in found.runs if run.status == "failed"]
    lines += [f"failed: {short_name(run.name)} ({run.deployment}): {run.error}" for run in failed[:MOST_FAILURES]]
    if len(failed) > MOST_FAILURES:
        lines.append(f"failed: {len(failed) - MOST_FAILURES} more")
    lines += _unjudged([run for run in found.runs if run.status == "unjudged"])
    lines += notes[:MOST_FAILURES]
    lines += [_speed(model) for model in found.models]
    if found.judge is not None:
        lines.append(f"judge {_speed(found.judge)}")
    return "\n".join([*lines, f"results: {suite_path}"])


def _unjudged(runs: Sequence[RunRecord]) -> list[str]:
    """List the runs that wait for a judge, and how to judge them."""
    if not runs:
        return []
    named = ", ".join(short_name(run.name) for run in runs[:MOST_FAILURES])
    more = f" and {len(runs) - MOST_FAILURES} more" if len(runs) > MOST_FAILURES else ""
    return [
        f"unjudged: {named}{more}; they are answered, and the same command with --judge MODEL has them judged without "
        "asking anything again"
    ]


def _speed(model: ModelRecord) -> str:
    parts = [f"{model.requests} requests ({model.cached} from the cache)"]
    if model.computed:
        tokens = model.prompt_tokens + model.new_tokens
        parts.append(f"{tokens} tokens, {model.prefix_tokens_saved} of them shared")
        parts.append(f"{model.sweeps} sweeps in {clock(model.seconds)}")
        parts.append(f"{model.computed / max(model.seconds, 1e-9):.1f} requests/s")
    if model.fraction is not None:
        parts.append(f"{model.fraction:.0%} of the limit")
    told = [f"{model.deployment}: {', '.join(parts)}", *map(str, model.devices)]
    return "; ".join(told)


def _table(scores: Sequence[Score], failed: Mapping[str, int]) -> list[str]:
    """A line for each score, or, where those are many, for each scenario, metric and split: their mean.

    `failed` counts the requests of each run that were not answered; they have a column where there are any.
    """

    def kind(score: Score) -> tuple[str, str, str, str]:
        return score.run.split(":", 1)[0], score.model, score.metric, score.split

    if len(scores) <= MOST_ROWS:
        rows = [(short_name(score.run), score.model, *kind(score)[2:], [score]) for score in scores]
    else:
        rows = []
        for key, group in groupby(sorted(scores, key=kind), kind):
            together = list(group)
            name = key[0] if len(together) == 1 else f"{key[0]}, mean of {len(together)} runs"
            rows.append((name, *key[1:], together))
    cells: list[tuple[str, ...]] = (
        [("run", "model", "metric", "split", "instances", "score", "failed requests")] if rows else []
    )
    for name, model, metric, split, together in rows:
        values = [score.value for score in together if score.value is not None]
        mean = f"{fsum(values) / len(values):.3f}" if values else "none"
        count = str(sum(score.num_instances for score in together))
        num_failed = sum(failed.get(score.run, 0) for score in together)
        cells.append((name, model, metric, split, count, mean, str(num_failed or "")))
    if not any(failed.get(score.run) for score in scores):
        cells = [row[:-1] for row in cells]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))] if cells else []
    return [
        "  ".join(
            cell.ljust(width) if column < 4 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
