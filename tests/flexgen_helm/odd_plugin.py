"""A user's plugin: a scenario that may kill the process that it is made in, and a metric that asks the model."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any, ClassVar

from helm.benchmark.adaptation.adapter_spec import AdapterSpec
from helm.benchmark.adaptation.common_adapter_specs import get_generation_adapter_spec
from helm.benchmark.metrics.common_metric_specs import get_exact_match_metric_specs
from helm.benchmark.metrics.metric import Metric, MetricSpec
from helm.benchmark.metrics.metric_name import MetricName
from helm.benchmark.metrics.statistic import Stat
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import (
    CORRECT_TAG,
    TEST_SPLIT,
    TRAIN_SPLIT,
    Input,
    Instance,
    Output,
    Reference,
    Scenario,
    ScenarioSpec,
)
from helm.common.request import Request

NOTES = "odd_plugin_deaths"
"""A file with a byte for each process that the scenario has killed."""


class OddScenario(Scenario):  # type: ignore[misc]
    """Sums; kills its process so many times before, if that only helps another one."""

    name = "odd"
    description = "sums"
    tags: ClassVar[list[str]] = []

    def __init__(self, deaths: int) -> None:
        super().__init__()
        self.deaths = deaths

    def get_instances(self, output_path: str) -> list[Instance]:
        notes = Path(NOTES)
        died = len(notes.read_text()) if notes.exists() else 0
        if multiprocessing.parent_process() is not None and died < self.deaths:
            notes.write_text("." * (died + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        splits = [TRAIN_SPLIT] * 2 + [TEST_SPLIT] * 3
        return [
            Instance(Input(f"{n} + {n}"), [Reference(Output(str(2 * n)), [CORRECT_TAG])], split)
            for n, split in enumerate(splits)
        ]


class AskingMetric(Metric):  # type: ignore[misc]
    """Asks the model that is evaluated, and makes nothing of a failure."""

    def evaluate_generation(self, *args: Any) -> list[Stat]:
        return []

    def evaluate(self, scenario_state: Any, metric_service: Any, eval_cache_path: str, parallelism: int) -> Any:
        result = super().evaluate(scenario_state, metric_service, eval_cache_path, parallelism)
        asked = scenario_state.request_states[0].request
        try:
            request = Request(model=asked.model, model_deployment=asked.model_deployment, prompt="Is it?", max_tokens=3)
            found = metric_service._context.make_request(request)
            length = len(found.completions[0].tokens) if found.success else 0
        except BaseException:
            length = 0
        result.aggregated_stats.append(Stat(MetricName("tokens_of_the_judge")).add(length))
        return result


@run_spec_function("odd")  # type: ignore[untyped-decorator]
def get_odd_spec(deaths: str = "0", asks: str = "no") -> RunSpec:
    """Sums, with a metric that asks the model if `asks`."""
    adapter: AdapterSpec = get_generation_adapter_spec(max_tokens=2, max_train_instances=2)
    metrics = get_exact_match_metric_specs()
    if asks == "yes":
        metrics = [*metrics, MetricSpec("odd_plugin.AskingMetric")]
    return RunSpec(
        name=f"odd:deaths={deaths},asks={asks}",
        scenario_spec=ScenarioSpec("odd_plugin.OddScenario", {"deaths": int(deaths)}),
        adapter_spec=adapter,
        metric_specs=metrics,
        groups=[],
    )
