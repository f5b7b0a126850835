"""Protects: HELM's tables of runs that a model of ours has judged say so, and never mix verdicts of several judges."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files

import pytest
from helm.benchmark.presentation.schema import Field, Schema, read_schema
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.run_specs.lite_run_specs import get_med_qa_spec
from helm.benchmark.run_specs.safety_run_specs import get_harm_bench_spec, get_xstest_spec

from engine.errors import ConfigError
from flexgen_helm.judging.judge import Judge
from flexgen_helm.judging.judged_runs import judged
from flexgen_helm.judging.judged_tables import with_judge

ONE, OTHER = Judge("local/one", "flexgen/one"), Judge("local/other", "flexgen/other")


def schema_of(name: str) -> Schema:
    return read_schema(str(files("helm.benchmark") / "static" / f"schema_{name}.yaml"))


@pytest.mark.parametrize("name", ["safety", "capabilities", "air_bench", "medhelm", "lite"])
def test_a_schema_is_as_it_was_where_no_model_of_ours_has_judged(name: str) -> None:
    schema = schema_of(name)
    for specs in ([], [get_med_qa_spec()], [get_harm_bench_spec()]):
        assert with_judge(schema, specs) == schema


def test_the_judge_is_in_the_columns_of_what_it_judged() -> None:
    before = schema_of("safety")
    after = with_judge(before, [judged(get_harm_bench_spec(), ONE), get_med_qa_spec()])
    assert after.name_to_metric["safety_score"].short_display_name == "LM Evaluated Safety score by local_one"
    assert "local_one" in str(after.name_to_metric["safety_score"].description)
    for name in ("bbq_accuracy", "num_instances"):
        assert after.name_to_metric[name] == before.name_to_metric[name]
    assert [each.name for each in after.name_to_metric_group["verdicts"].metrics] == ["judge_local_one_verdict_read"]
    assert "annotation_metrics" not in after.name_to_metric_group
    assert after.name_to_run_group["harm_bench"].metric_groups == ["accuracy", "general_information", "verdicts"]
    assert after.name_to_run_group["xstest"].metric_groups == ["accuracy", "general_information"]
    described = {name for name, group in after.name_to_run_group.items() if "local_one" in str(group.description)}
    assert described == {"safety_scenarios", "harm_bench"}
    generated = replace(before, metrics=[*before.metrics, Field(name="judge_local_one_verdict_read")])  # by HELM
    assert len(with_judge(generated, [judged(get_harm_bench_spec(), ONE)]).metrics) == len(after.metrics)


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ([judged(get_harm_bench_spec(), ONE), judged(get_harm_bench_spec(), OTHER)], "local_one and local_other"),
        ([judged(get_harm_bench_spec(), ONE), get_xstest_spec()], "local_one and the models that HELM asks"),
    ],
)
def test_verdicts_of_several_judges_are_not_averaged(specs: list[RunSpec], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        with_judge(schema_of("safety"), specs)


def test_a_benchmark_that_is_not_judged_by_a_model_is_no_matter_of_judges() -> None:
    plain = replace(get_med_qa_spec(), name="plain")
    found = with_judge(schema_of("capabilities"), [plain, judged(get_harm_bench_spec(), ONE)])
    assert all("verdicts" not in group.metric_groups for group in found.run_groups)
