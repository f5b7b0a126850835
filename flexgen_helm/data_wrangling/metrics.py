"""Precision, recall and F1 of the answer Yes, and accuracy, over all instances of a split."""

from __future__ import annotations

from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.metrics.evaluate_instances_metric import EvaluateInstancesMetric
from helm.benchmark.metrics.metric import MetricMetadata
from helm.benchmark.metrics.metric_name import MetricName
from helm.benchmark.metrics.statistic import Stat

from flexgen_helm.data_wrangling.datasets import NO, YES

_DESCRIPTIONS = {
    "yes_precision": ("Precision", "Of the answers that begin with Yes, the share that should."),
    "yes_recall": ("Recall", "Of the instances whose answer is Yes, the share answered so."),
    "yes_f1": ("F1", "Harmonic mean of precision and recall of the answer Yes."),
    "yes_no_accuracy": ("Accuracy", "Share of right answers; one that is neither Yes nor No is wrong."),
    "yes_no_neither": ("Neither", "Share of answers that begin with neither Yes nor No."),
}


def answer_of(text: str) -> str | None:
    """What a completion says: Yes or No if it begins so (in any case, after white space), else None."""
    text = text.strip().lower()
    return next((answer for answer in (YES, NO) if text.startswith(answer.lower())), None)


class YesNoMetric(EvaluateInstancesMetric):
    """Scores of tasks whose answers are Yes and No, as Narayan et al. report them: F1 of Yes.

    As in the paper, what a completion begins with counts. One that begins with neither is wrong in the accuracy and no
    Yes in precision and recall. A ratio with nothing below its line is 0. HELM's `ClassificationMetric` would need
    completions that are the bare word, has no accuracy, and by default averages F1 over both answers.
    """

    def evaluate_instances(self, request_states: list[RequestState], eval_cache_path: str) -> list[Stat]:
        """Scores of one split (and perturbation) of one trial."""
        told, right = [], []
        for state in request_states:
            assert state.result is not None
            (reference,) = state.instance.all_correct_references
            right.append(reference.output.text)
            told.append(answer_of(state.result.completions[0].text) if state.result.completions else None)
        pairs = list(zip(told, right, strict=True))
        hits = pairs.count((YES, YES))
        precision, recall = (hits / max(1, answers.count(YES)) for answers in (told, right))
        scores = {
            "yes_precision": precision,
            "yes_recall": recall,
            "yes_f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
            "yes_no_accuracy": sum(a == b for a, b in pairs) / len(pairs),
            "yes_no_neither": told.count(None) / len(pairs),
        }
        return [Stat(MetricName(name)).add(score) for name, score in scores.items()]

    def get_metadata(self) -> list[MetricMetadata]:
        """What HELM's pages say of the scores."""
        return [
            MetricMetadata(
                name=name,
                display_name=shown,
                description=text,
                lower_is_better=name == "yes_no_neither",
                group="accuracy",
            )
            for name, (shown, text) in _DESCRIPTIONS.items()
        ]
