"""Finds problems of a run beforehand that HELM would find only after all inference, or never."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from helm.benchmark.adaptation.adapter_spec import ADAPT_CHAT, ADAPT_LANGUAGE_MODELING
from helm.benchmark.metrics.metric import MetricSpec, create_metric
from helm.benchmark.model_deployment_registry import get_model_deployment
from helm.benchmark.run_spec import RunSpec
from helm.common.object_spec import get_class_by_name
from helm.common.optional_dependencies import OptionalDependencyNotInstalled

from engine.errors import ConfigError, EngineError, InstallationError, named, one_line
from flexgen_helm.terminal.installation import lacks

_WITHOUT_WINDOW = (ADAPT_CHAT, ADAPT_LANGUAGE_MODELING)
"""Adapters that shorten no prompts, or shorten them by their own rule."""
_METRICS_THAT_SPLIT_WORDS = {"bleu_1", "bleu_4"}


def find_problems(run_specs: Sequence[RunSpec]) -> dict[str, EngineError]:
    """Return the first reason why each run spec cannot be run, by its name; call it in the main thread."""
    crowded = {run_spec.name: problem for run_spec in run_specs if (problem := _no_room(run_spec)) is not None}
    return {**find_unusable_metrics(run_specs), **_find_unusable_annotators(run_specs), **crowded}


def _no_room(run_spec: RunSpec) -> ConfigError | None:
    """Return an error if answers alone fill what HELM takes for the window: it would shorten prompts for ever."""
    spec = run_spec.adapter_spec
    if spec.method in _WITHOUT_WINDOW or not spec.model_deployment:
        return None
    deployment = get_model_deployment(spec.model_deployment)
    longest = deployment.max_request_length or deployment.max_sequence_length
    if longest is None or spec.max_tokens < longest:
        return None
    return ConfigError(
        f"{run_spec.name}: max_tokens {spec.max_tokens} leaves no room for a prompt in the {longest} tokens of "
        f"{deployment.name}, and HELM shortens prompts until both fit; ask for fewer tokens (increase_max_tokens), or "
        "for longer sequences (--max-sequence-length) if the model takes them"
    )


def _find_unusable_annotators(run_specs: Sequence[RunSpec]) -> dict[str, EngineError]:
    """The errors of annotators that cannot be imported, by run spec and annotator; no annotator is created."""
    problems: dict[str, EngineError] = {}
    for run_spec in run_specs:
        for annotator in run_spec.annotators or ():
            what = f"{run_spec.name}: annotator {annotator.class_name.rsplit('.', 1)[-1]}"
            try:
                get_class_by_name(annotator.class_name)
            except Exception as error:  # its module may raise anything
                problems.setdefault(run_spec.name, _not_imported(what, error))
    return problems


def find_unusable_metrics(run_specs: Sequence[RunSpec]) -> dict[str, EngineError]:
    """Create every metric of the run specs once; returns the first error of each run spec that has any, by its name.

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
    except (ImportError, OptionalDependencyNotInstalled) as error:
        return _not_imported(f"metric {name}", error)
    except Exception as error:
        return ConfigError(f"metric {name} cannot be made: {named(error)}")
    if _splits_words(metric_spec) and not _can_split_words():
        return InstallationError(
            f"metric {name} needs NLTK's punkt_tab data; run `python -m nltk.downloader punkt_tab`, "
            "or let NLTK_DATA name a directory that has tokenizers/punkt_tab"
        )
    return None


def _not_imported(what: str, error: Exception) -> EngineError:
    if isinstance(error, ModuleNotFoundError):
        return InstallationError(f"{what} {lacks(error)}")
    if isinstance(error, ImportError | OptionalDependencyNotInstalled):
        return InstallationError(f"{what} cannot be imported: {one_line(error)}")
    return ConfigError(f"{what} cannot be imported: {named(error)}")


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
