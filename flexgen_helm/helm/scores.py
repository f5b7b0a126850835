"""The table of scores that ends a run, read from the files that HELM wrote."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError
from engine.reading import read_json
from flexgen_helm.helm.records.named_classes import named_class
from flexgen_helm.terminal.columns import columns

if TYPE_CHECKING:
    from helm.benchmark.run_spec import RunSpec

FALLBACK_METRICS = (
    "quasi_exact_match",
    "exact_match",
    "quasi_prefix_exact_match",
    "prefix_exact_match",
    "f1_score",
    "rouge_l",
    "bits_per_byte",
    "safety_score",
)
"""Used in this order if a scenario does not name its main metric, as XSTest's does not."""
SPLITS = ("test", "valid")
_VERDICTS = re.compile(r"judge_.+_verdict_read")
"""The statistic that a judged run has."""


@dataclass(frozen=True)
class Score:
    """The main metric of one run; `value` is None where HELM computed none."""

    run: str
    model: str
    metric: str
    split: str
    num_instances: int
    value: float | None


def short_name(run: str) -> str:
    """Return a run's name without its model."""
    scenario, _, arguments = run.partition(":")
    kept = [each for each in arguments.split(",") if each and not each.startswith(("model=", "model_deployment="))]
    return f"{scenario}:{','.join(kept)}" if kept else scenario


def distinct_names(runs: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return a distinct short name of each run, without the part that all share; and that part.

    If the names differ in one argument, its value is enough.
    """
    split = {run: short_name(run).partition(":") for run in runs}
    arguments = {run: rest.split(",") if rest else [] for run, (_, _, rest) in split.items()}
    if len({short_name(run) for run in runs}) < 2:
        return {run: short_name(run) for run in runs}, []
    first, *others = arguments.values()
    shared = [argument for argument in first if all(argument in other for other in others)]
    own = {run: [argument for argument in arguments[run] if argument not in shared] for run in runs}
    is_one = (
        all(len(each) == 1 for each in own.values()) and len({each[0].partition("=")[0] for each in own.values()}) == 1
    )
    names = {}
    for run, (scenario, _, _) in split.items():
        told = ",".join(own[run])
        names[run] = f"{scenario} {told.partition('=')[2]}" if is_one else f"{scenario}:{told}" if told else scenario
    return names, shared


def read_scores(run_specs: Iterable[RunSpec], runs_path: Path) -> list[Score]:
    """Read the main metric of each run whose `stats.json` exists; a damaged one has no value."""
    scores = []
    for run_spec in run_specs:
        file = runs_path / run_spec.name / "stats.json"
        if file.is_file():
            scenario = run_spec.scenario_spec
            metric, split = main_metric(scenario.class_name, json.dumps(scenario.args, sort_keys=True))
            name, model = run_spec.name, run_spec.adapter_spec.model
            try:
                scores.append(choose(read_json(file, ConfigError), name, model, metric, split))
            except (ConfigError, ValueError, KeyError, TypeError, AttributeError):
                scores.append(choose([], name, model, metric, split))
    return scores


def choose(
    stats: Sequence[dict[str, Any]], run: str, model: str, metric: str | None = None, split: str | None = None
) -> Score:
    """Choose the run's score among its stats: the named metric on the named split if it exists, else the closest.

    A judged run without the named metric has no score: none of its verdicts could be read.
    """
    plain = {(stat["name"]["name"], stat["name"].get("split")): stat for stat in stats if is_plain(stat["name"])}
    is_judged = any(_VERDICTS.fullmatch(name) for name, _ in plain)
    metrics = [metric] if metric and is_judged else [*([metric] if metric else []), *FALLBACK_METRICS]
    splits = ([split] if split else []) + list(SPLITS)
    for name in metrics:
        for part in splits:
            stat = plain.get((name, part))
            if stat is not None and stat.get("count"):
                instances = plain.get(("num_instances", part), {}).get("sum", 0)
                return Score(run, model, name, part, round(instances), float(stat["mean"]))
    return Score(run, model, metrics[0], splits[0], 0, None)


def table(scores: Sequence[Score]) -> str:
    """Lay the scores out in columns; if they are of one model, its name is in the header."""
    models = {score.model for score in scores}
    rows = [(models.copy().pop() if len(models) == 1 else "run", "metric", "split", "instances", "score")]
    for score in scores:
        value = "none" if score.value is None else f"{score.value:.3f}"
        run = short_name(score.run) if len(models) == 1 else score.run
        rows.append((run, score.metric, score.split, str(score.num_instances), value))
    return columns(rows, 3)


def is_plain(name: dict[str, Any]) -> bool:
    """Whether a statistic's name is that of unperturbed instances of a whole split."""
    return "perturbation" not in name and "sub_split" not in name


def recorded_main_metric(scenario: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The main metric and split of the scenario that a run's file names; unknown where that is not to be trusted."""
    from helm.benchmark.scenarios.scenario import Scenario

    name = str(scenario["class_name"])
    try:
        named_class(name, Scenario)
    except ConfigError:
        return None, None
    return main_metric(name, json.dumps(scenario.get("args") or {}, sort_keys=True))


@functools.cache
def main_metric(scenario_class: str, scenario_args: str) -> tuple[str | None, str | None]:
    """Ask a scenario for its main metric and split; not every scenario knows them. `scenario_args` are JSON."""
    from helm.benchmark.scenarios.scenario import ScenarioSpec, create_scenario

    try:
        metadata = create_scenario(
            ScenarioSpec(class_name=scenario_class, args=json.loads(scenario_args))
        ).get_metadata()
    except Exception:  # mostly NotImplementedError, or anything that a scenario's constructor raises
        return None, None
    return metadata.main_metric, metadata.main_split
