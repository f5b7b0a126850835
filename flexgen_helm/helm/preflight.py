"""What HELM would find out about its metrics only after all inference, found out before."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from helm.benchmark.metrics.metric import MetricSpec, create_metric
from helm.benchmark.run_spec import RunSpec
from helm.common.object_spec import get_class_by_name
from helm.common.optional_dependencies import OptionalDependencyNotInstalled

from engine.errors import ConfigError, EngineError, InstallationError, named, one_line
from flexgen_helm.terminal.installation import lacks

_METRICS_THAT_SPLIT_WORDS = {"bleu_1", "bleu_4"}


def find_unusable_metrics(run_specs: Sequence[RunSpec]) -> dict[str, EngineError]:
    """Make every metric of the run specs once; return the first trouble of each run spec that has any, by its name.

    Call it in the main thread: some of HELM's metric modules install signal handlers when they are imported.
    """
    problems: dict[str, EngineError] = {}
    known: dict[MetricSpec, EngineError | None] = {}
    for run_spec in run_specs:
        for metric_spec in run_spec.metric_specs:
            if metric_spec not in known:
                known[metric_spec] = _problem(metric_spec)
            if problem := known[metric_spec]:
                problems.setdefault(run_spec.name, type(problem)(f"{run_spec.name}: {problem}"))
    return problems


def _problem(metric_spec: MetricSpec) -> EngineError | None:
    name = metric_spec.class_name.rsplit(".", 1)[-1]
    try:
        create_metric(metric_spec)
    except ModuleNotFoundError as error:
        return InstallationError(f"metric {name} {lacks(error)}")
    except (ImportError, OptionalDependencyNotInstalled) as error:
        return InstallationError(f"metric {name} cannot be imported: {one_line(error)}")
    except Exception as error:
        return ConfigError(f"metric {name} cannot be made: {named(error)}")
    if _splits_words(metric_spec) and not _can_split_words():
        return InstallationError(
            f"metric {name} needs NLTK's punkt_tab data; run `python -m nltk.downloader punkt_tab`, "
            "or let NLTK_DATA name a directory that has tokenizers/punkt_tab"
        )
    return None


def _splits_words(metric_spec: MetricSpec) -> bool:
    module = sys.modules[get_class_by_name(metric_spec.class_name).__module__]
    of_nltk = getattr(getattr(module, "word_tokenize", None), "__module__", "").startswith("nltk.")
    names = metric_spec.args.get("names") or []
    return of_nltk or bool(_METRICS_THAT_SPLIT_WORDS.intersection(names))


def _can_split_words() -> bool:
    from nltk.tokenize import word_tokenize  # type: ignore[import-untyped]

    try:
        word_tokenize("Can it?")
    except LookupError:
        return False
    return True
