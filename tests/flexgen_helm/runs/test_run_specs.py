"""Protects: HELM builds every entry of the shipped files for a model of ours, and what is said of them holds."""

from __future__ import annotations

import collections
import functools
import importlib.util
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import built_entries
import pytest
import scenario_table
from built_entries import DOWNLOADED_WHILE_PARSING, NEEDS_XLRD, RUN_SPECS, Built, kind_of
from stats import read

from engine.errors import ConfigError
from engine.policy import Policy
from flexgen_helm.runs.entries import Target, assign_models, build_run_specs, read_entries
from flexgen_helm.runs.flags import parse_run_flags, policy_from_flags

NUM_RUN_SPECS = {
    "air_bench": 1,
    "anthropic_red_team": 1,
    "bbq": 1,
    "capabilities": 5,
    "capabilities_reasoning": 5,
    "classic": 455,  # 418 entries; synthetic_efficiency sweeps 5 x 7 sizes, big_bench 4 numbers of examples
    "classic_manual": 46,
    "classic_short": 281,
    "data_wrangling": 17,
    "demo": 3,
    "flexgen_30b": 7,
    "flexgen_fast": 72,
    "gpqa": 3,
    "harm_bench": 2,
    "ifeval": 1,
    "lite": 108,
    "long_context": 6,
    "medhelm_public": 17,
    "mmlu": 57,
    "mmlu_pro": 1,
    "nightly": 12,
    "omni_math": 1,
    "quick": 7,
    "safety": 5,
    "simple_safety_tests": 1,
    "wildbench": 1,
    "xstest": 1,
}
SAME_NAME = "legal_summarization"  # of three entries of HELM's: in one suite they overwrite each other

Build = Callable[..., Built]


@pytest.fixture(scope="module")
def build(
    helm_data: Path, tmp_path_factory: pytest.TempPathFactory, register_helms_configs: Callable[[], None]
) -> Build:
    """Build the entries of a command line for a model registered locally, once, with HELM's data in place."""
    register_helms_configs()
    built_entries.register_model(tmp_path_factory.mktemp("entries") / "prod_env")

    once = functools.cache(lambda *arguments: built_entries.build(list(arguments), helm_data))
    return lambda *arguments: dict(once(*arguments))


def test_every_shipped_file_is_looked_at_here() -> None:
    assert set(built_entries.FILES) == set(NUM_RUN_SPECS)


LONG = ("classic", "classic_short")


@pytest.mark.parametrize(
    "conf", [pytest.param(conf, marks=[pytest.mark.slow] if conf in LONG else []) for conf in NUM_RUN_SPECS]
)
def test_every_entry_builds_its_run_specs(build: Build, conf: str) -> None:
    built = build("-c", conf)
    if importlib.util.find_spec("xlrd") is None:
        lacking = [entry for entry in built if kind_of(entry) in NEEDS_XLRD]
        assert all("xlrd" in str(built.pop(entry)) for entry in lacking)
    else:
        lacking = []
    assert {entry: str(error) for entry, error in built.items() if isinstance(error, ConfigError)} == {}
    run_specs = [run_spec for each in built.values() for run_spec in each]
    assert len(run_specs) + len(lacking) == NUM_RUN_SPECS[conf]
    names = collections.Counter(run_spec.name.split(":")[0] for run_spec in run_specs if SAME_NAME in run_spec.name)
    assert names[SAME_NAME] == {"classic": 1, "classic_manual": 2}.get(conf, 0)
    assert len({run_spec.name for run_spec in run_specs}) == len(run_specs) - max(0, names[SAME_NAME] - 1)
    for run_spec in run_specs:
        assert run_spec.adapter_spec.model_deployment == "ours/entries"
        assert run_spec.adapter_spec.max_eval_instances is not None


def test_only_these_entries_download_while_they_are_parsed(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("a download while parsing")

    entries = {kind_of(entry): entry for conf in NUM_RUN_SPECS for entry in build("-c", conf)}  # one of each kind
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    built = built_entries.build(["-r", *entries.values()], tmp_path / "nothing")
    failed = {kind_of(entry) for entry, told in built.items() if "a download while parsing" in str(told)}
    assert failed == DOWNLOADED_WHILE_PARSING


@pytest.mark.skipif(importlib.util.find_spec("docx") is not None, reason="the package is installed")
def test_an_entry_that_needs_a_package_says_which(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "helm.benchmark.scenarios.race_based_med_scenario", raising=False)
    args = parse_run_flags(["-r", "race_based_med"])
    target = Target(model="local/entries", model_deployment="ours/entries")
    entries = assign_models(read_entries(args), [target.model], lambda _: target, skip_others=False)
    with pytest.raises(ConfigError, match=r"race_based_med.* needs the package docx; run `pip install python-docx`"):
        build_run_specs(entries, args)


def test_a_model_that_follows_instructions_gets_those_of_the_lite_leaderboard(
    build: Build, helm_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helm.benchmark.model_metadata_registry import INSTRUCTION_FOLLOWING_MODEL_TAG, get_model_metadata
    from helm.benchmark.run_expander import IN_CONTEXT_LEARNING_INSTRUCTIONS_PREFIX

    entry = "gsm:follow_format_instructions=instruct"
    (plain,) = build("-r", entry)[entry]
    tags = [*get_model_metadata("local/entries").tags, INSTRUCTION_FOLLOWING_MODEL_TAG]
    monkeypatch.setattr(get_model_metadata("local/entries"), "tags", tags)
    (instructed,) = built_entries.build(["-r", entry], helm_data)[entry]
    assert plain.adapter_spec.global_prefix == ""
    assert IN_CONTEXT_LEARNING_INSTRUCTIONS_PREFIX in instructed.adapter_spec.global_prefix


def test_short_lists_are_part_of_the_long_ones() -> None:
    @functools.cache
    def entries(conf: str) -> dict[str, int]:
        return {entry.description: entry.priority for entry in read_entries(parse_run_flags(["-c", conf]))}

    assert entries("classic_short").items() <= entries("classic").items()
    wrangling = entries("data_wrangling").items()
    assert {kind_of(entry) for entry, _ in wrangling - entries("classic").items()} == {"data_wrangling"}
    assert not entries("classic_manual").keys() & entries("classic").keys()
    subjects = {f"{entry},data_augmentation=canonical" for entry in entries("mmlu")}
    assert subjects == {entry for entry in entries("classic") if kind_of(entry) == "mmlu"}


def test_each_entry_of_flexgens_list_is_selected_with_its_policy(build: Build) -> None:
    text = (RUN_SPECS / "flexgen_30b.conf").read_text()
    commands = re.findall(r"^#   flexgen-helm run (.*)$", text, re.MULTILINE)
    assert [Policy.load(policy_from_flags(parse_run_flags(each.split()))).gpu_batch_size for each in commands] == [
        48,
        96,
    ]
    rows = re.findall(r"^  # --groups-to-run (\S+) --policy (\S+);", text, re.MULTILINE)
    sizes = {name: (Policy.load(name).gpu_batch_size, Policy.load(name).num_gpu_batches) for _, name in rows}
    assert sizes == {
        "helm-30b-wikifact": (96, 3),
        "helm-30b-mmlu": (48, 3),
        "helm-30b-synthetic": (36, 4),
        "helm-30b-xsum": (8, 4),
    }
    assert all(Policy.load(name).cpu_cache_compute for name in sizes)
    selected = [
        entry
        for group, _ in rows
        for entry, told in build("-c", "flexgen_30b", "--groups-to-run", group).items()
        if not isinstance(told, ConfigError)
    ]
    assert sorted(selected) == sorted(build("-c", "flexgen_30b"))
    assert len(selected) == 7


@pytest.mark.parametrize(("arguments", "temperature"), [("", 0.3), (":temperature=0.7", 0.7)])
def test_our_summarization_entry_differs_from_helms_in_its_metrics_alone(
    build: Build, arguments: str, temperature: float
) -> None:
    (own,) = build("-r", f"summarization_xsum_rouge{arguments}").popitem()[1]
    (helms,) = build("-r", f"summarization_xsum_sampled{arguments}").popitem()[1]
    assert own.scenario_spec == helms.scenario_spec
    assert own.adapter_spec == helms.adapter_spec
    assert own.adapter_spec.temperature == temperature
    assert own.data_augmenter_spec == helms.data_augmenter_spec
    assert own.groups == helms.groups
    assert own.name == "summarization_xsum_rouge:model=local_entries,model_deployment=ours_entries"
    (named,) = [metric.args["names"] for metric in own.metric_specs if "names" in metric.args]
    assert named == ["rouge_1", "rouge_2", "rouge_l"]
    classes = [{metric.class_name.split(".")[-1] for metric in each.metric_specs} for each in (helms, own)]
    assert classes[0] - classes[1] == {"SummarizationMetric"}
    assert classes[1] <= classes[0]


def test_our_summarization_entry_is_one_of_helm_runs_too(helm_run: Callable[..., Path]) -> None:
    runs = helm_run("-r", "summarization_xsum_rouge:temperature=0.3,model=simple/model1", "-m", "2", suite="plain")
    (run,) = runs.glob("summarization_xsum_rouge*")
    assert {"rouge_1", "rouge_2", "rouge_l"} <= {stat["name"]["name"] for stat in read(run, "stats.json")}


def test_the_table_in_docs_is_what_would_be_written_anew(build: Build) -> None:
    told = scenario_table.table({conf: build("-c", conf) for conf in built_entries.FILES})
    assert scenario_table.DOCUMENT.read_text(encoding="utf-8") == told, f"stale: {scenario_table.COMMAND}"
