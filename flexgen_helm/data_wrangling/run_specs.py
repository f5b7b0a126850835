"""Our own run entries, which the plugin registers with HELM, so that `helm-run` has them, too."""

from __future__ import annotations

import dataclasses

from helm.benchmark.run_spec import RunSpec, run_spec_function


@run_spec_function("summarization_xsum_rouge")
def get_xsum_rouge_spec() -> RunSpec:
    """HELM's summarization_xsum_sampled with no metrics but the generic ones, ROUGE-1, -2 and -L among them.

    Same instances, prompts and sampling. HELM's own summarization metrics, of which ROUGE is a part and computed by
    the same function, need packages that do not install everywhere (`crfm-helm[summarization]`). An entry's
    `temperature=` is no argument of this: HELM sets it on any run spec.
    """
    from helm.benchmark.metrics.common_metric_specs import get_basic_metric_specs
    from helm.benchmark.run_specs.classic_run_specs import get_xsum_sampled_summarization_spec

    return dataclasses.replace(
        get_xsum_sampled_summarization_spec(),
        name="summarization_xsum_rouge",
        metric_specs=get_basic_metric_specs(["rouge_1", "rouge_2", "rouge_l"]),
    )


@run_spec_function("data_wrangling")
def get_data_wrangling_spec(
    dataset: str = "",
    task: str | None = None,
    selection: str = "manual",
    k: int | None = None,
    seed: int = 0,
    data: str | None = None,
) -> RunSpec:
    """Data wrangling as in Narayan et al. 2022: `data_wrangling:task=entity_matching,dataset=Beer`.

    `selection` of demonstrations is `manual` (written for the data set; `k` of them, by default all), `random` or
    `cluster` (`k` of the train split, by default 10; `seed` decides which). `data` is the folder of the authors'
    archive, unpacked; without it the archive is fetched when the run begins. Raises `ConfigError` for values that
    cannot be meant.
    """
    from helm.benchmark.adaptation.common_adapter_specs import get_generation_adapter_spec
    from helm.benchmark.metrics.common_metric_specs import get_exact_match_metric_specs
    from helm.benchmark.metrics.metric import MetricSpec
    from helm.benchmark.scenarios.scenario import ScenarioSpec

    from flexgen_helm.data_wrangling.datasets import find_dataset
    from flexgen_helm.data_wrangling.selection import num_demonstrations

    found = find_dataset(dataset, task)
    k = num_demonstrations(found, selection, k, seed)
    args: dict[str, object] = {"dataset": dataset, "selection": selection, "k": k, "seed": seed}
    args |= {} if data is None else {"data": str(data)}
    metrics = get_exact_match_metric_specs()
    if found.task.is_binary:
        metrics.append(MetricSpec(class_name="flexgen_helm.data_wrangling.metrics.YesNoMetric"))
    shown = ",".join(f"{key}={value}" for key, value in {"task": found.task_name, **args}.items())
    return RunSpec(
        name=f"data_wrangling:{shown}",
        scenario_spec=ScenarioSpec(class_name="flexgen_helm.data_wrangling.scenario.DataWranglingScenario", args=args),
        adapter_spec=get_generation_adapter_spec(
            instructions=found.instructions,
            output_noun=found.output_noun,
            max_train_instances=k,
            max_tokens=found.task.max_tokens,
            sample_train=selection == "random",
        ),
        metric_specs=metrics,
        groups=["data_wrangling", f"data_wrangling_{found.task_name}"],
    )
