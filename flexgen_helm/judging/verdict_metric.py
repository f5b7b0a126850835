"""HELM's metric that records in a run's statistics which model judged it, and how many verdicts were readable."""

from __future__ import annotations

from helm.benchmark.adaptation.adapter_spec import AdapterSpec
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.metrics.metric import Metric, MetricMetadata
from helm.benchmark.metrics.metric_name import MetricName
from helm.benchmark.metrics.metric_service import MetricService
from helm.benchmark.metrics.statistic import Stat

from flexgen_helm.judging.annotating import verdict_of
from flexgen_helm.judging.verdicts import READ


class VerdictMetric(Metric):
    """`judge_NAME_verdict_read`: 1 for an answer whose verdict could be read, 0 for one that scores nothing."""

    def __init__(self, judge: str) -> None:
        self._name = f"judge_{judge}_verdict_read"
        self._judge = judge

    def evaluate_generation(
        self,
        adapter_spec: AdapterSpec,
        request_state: RequestState,
        metric_service: MetricService,
        eval_cache_path: str,
    ) -> list[Stat]:
        """No statistics for an answer that was not to be judged."""
        verdict = verdict_of(request_state)
        return [] if verdict is None else [Stat(MetricName(self._name)).add(int(verdict == READ))]

    def get_metadata(self) -> list[MetricMetadata]:
        """The description that helm-summarize shows."""
        return [
            MetricMetadata(
                name=self._name,
                display_name=f"Verdicts of {self._judge}",
                short_display_name="Verdicts read",
                description=f"Share of the answers judged by {self._judge} whose verdict could be read; the others "
                "score nothing.",
                lower_is_better=False,
                group=None,
            )
        ]
