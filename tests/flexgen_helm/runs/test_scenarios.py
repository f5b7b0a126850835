"""Protects: each kind of shipped entry runs, and where it can be told, scores are those of HELM's own client."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import built_entries
import dataset_cache
import leaderboard_data
import pytest
import scenario_data
import yaml
from fake_engine import FakeEngine
from helm.benchmark import config_registry
from scenario_cases import CASES, Case
from stats import NEVER_COMPARED, ZERO_IN_THE_REFERENCE, assert_alike, read, stats_of, texts_of
from tiny_models import ours, random_llama, save_tiny_model, write_entries
from transformers import AutoTokenizer

from engine import Completion, Job
from flexgen_helm.helm.engines import engines

WINDOW = 2048
FETCHING = ("DisinformationHumanEvalMetrics",)
"""Metrics that fetch a file for every run: what people said of other models' texts."""
NUM_INSTANCES = 2
CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"
RANKED_BY_THEM = [
    "exact_match",
    "predicted_index",
    "*@*",
    "ref*_rank",
]  # log-probabilities that are all 0.0 rank nothing
REFERENCE, OURS = "helm.benchmark.runner.Runner", "flexgen_helm.runner.FlexGenRunner"


def wide_llama(tokenizer: Any) -> Any:
    """`random_llama` with room for examples and for HELM's longest answers."""
    model = random_llama(tokenizer)
    model.config.max_position_embeddings = WINDOW
    return model


def fitting(run_spec: Any, max_tokens: int | None) -> Any:
    """With answers that a tiny model's window has room for; without a judge, who has tests of his own."""
    from flexgen_helm.judging.judged_runs import without_judge

    adapter = run_spec.adapter_spec
    adapter = dataclasses.replace(adapter, max_tokens=max_tokens or adapter.max_tokens)
    return dataclasses.replace(without_judge(run_spec), adapter_spec=adapter)


@pytest.fixture(scope="module")
def prod_env(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """A directory with HELM's entries for one tiny model with two deployments, ours and the reference.

    Of a model without a chat template, or of one that has one.
    """
    folder = tmp_path_factory.mktemp("scenarios")

    @functools.cache
    def of(is_chat: bool) -> Path:
        name, template = ("talks", CHAT_TEMPLATE) if is_chat else ("scenarios", None)
        model = save_tiny_model(folder / f"tiny-{name}", wide_llama, chat_template=template)
        reference = {
            "class_name": "helm.clients.huggingface_client.HuggingFaceClient",
            "args": {"pretrained_model_name_or_path": str(model), "device": "cpu", "torch_dtype": "torch.float32"},
        }
        entries = folder / f"prod_env_{name}"
        own = {"thinking": ours(model, reasoning={"begin": "<think>", "end": "</think>"}), "answering": ours(model)}
        write_entries(entries, f"local/{name}", model, ours=ours(model), reference=reference, **own)
        deployments = entries / "model_deployments.yaml"
        content = yaml.safe_load(deployments.read_text())
        for deployment in content["model_deployments"]:
            deployment["max_sequence_length"] = WINDOW
        deployments.write_text(yaml.safe_dump(content))
        config_registry.register_configs_from_directory(str(entries))
        return entries

    return of


@pytest.fixture(scope="module")
def data(helm_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """HELM's output directory with all data that the cases need, NLTK's words among them."""
    import datasets
    import nltk
    from helm.benchmark.augmentations.dialect_perturbation import DialectPerturbation
    from helm.benchmark.augmentations.person_name_perturbation import PersonNamePerturbation

    folder = tmp_path_factory.mktemp("libraries")
    dataset_cache.place_datasets(helm_data, folder / "datasets")
    leaderboard_data.place_leaderboards(helm_data, folder / "datasets")
    scenario_data.place_punkt(folder / "nltk")
    scenario_data.place_by_hand(folder)
    split_into_sentences = nltk.tokenize._get_punkt_tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        patch.setattr(nltk.data, "path", [str(folder / "nltk"), *nltk.data.path])
        for perturbation in (DialectPerturbation, PersonNamePerturbation):  # which look where HELM wrote when imported
            patch.setattr(perturbation, "OUTPUT_PATH", str(helm_data / "perturbations" / perturbation.name))
        split_into_sentences.cache_clear()
        yield helm_data
    split_into_sentences.cache_clear()


@pytest.fixture(scope="module")
def run(
    prod_env: Callable[[bool], Path], data: Path, register_helms_configs: Callable[[], None]
) -> Iterator[Callable[..., Path]]:
    """Run a case on one deployment, once; returns its directory."""
    from helm.benchmark import runner
    from helm.benchmark.run import run_benchmarking
    from helm.common.authentication import Authentication

    import flexgen_helm.plugin  # noqa: F401 - registers our run entries
    from flexgen_helm.helm.engines import engines
    from flexgen_helm.helm.preflight import find_unusable_metrics
    from flexgen_helm.runs.entries import Target, assign_models, build_run_specs, read_entries
    from flexgen_helm.runs.flags import parse_run_flags

    register_helms_configs()
    runner.set_benchmark_output_path(str(data))
    done: dict[tuple[Case, str, str], Path] = {}

    def run(case: Case, host: str, suite: str = "scenarios") -> Path:
        if (case, host, suite) in done:
            return done[case, host, suite]
        local_path, name = prod_env(case.is_chat), "talks" if case.is_chat else "scenarios"
        args = parse_run_flags(["-r", case.entry, "-m", str(NUM_INSTANCES)])
        target = Target(model=f"local/{name}", model_deployment=f"{host}/{name}")
        entries = assign_models(read_entries(args), [target.model], lambda _: target, skip_others=False)
        with built_entries.what_entries_are_built_with():
            run_spec = fitting(build_run_specs(entries, args)[0], case.max_tokens)
        usable = [metric for metric in run_spec.metric_specs
                  if not metric.class_name.endswith(FETCHING)
                  and not find_unusable_metrics([dataclasses.replace(run_spec, metric_specs=[metric])])]  # fmt: skip
        lacking = {metric.class_name.split(".")[-1] for metric in run_spec.metric_specs if metric not in usable}
        assert lacking <= case.extra_metrics
        with built_entries.what_entries_are_built_with():
            run_benchmarking(
                run_specs=[dataclasses.replace(run_spec, metric_specs=usable)],
                auth=Authentication(""),
                url=None,
                local_path=str(local_path),
                num_threads=1,
                output_path=str(data),
                suite=suite,
                dry_run=False,
                skip_instances=False,
                cache_instances=False,
                cache_instances_only=False,
                skip_completed_runs=False,
                exit_on_error=True,
                runner_class_name=REFERENCE if host == "reference" else OURS,
                disable_cache=True,
            )
        done[case, host, suite] = data / "runs" / suite / run_spec.name
        return done[case, host, suite]

    yield run
    engines.close()


def named(*cases: Case) -> list[Any]:
    return [pytest.param(case, id=case.entry, marks=[] if case.quick else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", named(*(case for case in CASES if not case.is_sampled)))
def test_scores_are_those_of_helms_own_client(run: Callable[..., Path], case: Case) -> None:
    mine, reference = run(case, "ours"), run(case, "reference")
    assert texts_of(mine) == texts_of(reference)
    assert len(texts_of(mine)) >= NUM_INSTANCES
    left_out = NEVER_COMPARED + ([] if case.only_scores else ZERO_IN_THE_REFERENCE)
    if read(mine, "run_spec.json")["adapter_spec"]["method"] == "ranking_binary":
        left_out += RANKED_BY_THEM
    expected, told = stats_of(reference, left_out=left_out), stats_of(mine, left_out=left_out)
    assert_alike(told, expected)
    assert len(told) > 5


@pytest.mark.parametrize("case", named(*(case for case in CASES if case.is_sampled)))
def test_samples_are_scored_and_can_be_drawn_again(run: Callable[..., Path], case: Case) -> None:
    mine, again, reference = run(case, "ours"), run(case, "ours", "again"), run(case, "reference")
    assert texts_of(mine) == texts_of(again)
    assert len(texts_of(mine)) == len(texts_of(reference))
    for state in read(mine, "scenario_state.json")["request_states"]:
        completions = [completion["text"] for completion in state["result"]["completions"]]
        assert len(completions) == state["request"]["num_completions"]
        assert len(set(completions)) > 1 or len(completions) == 1
    told = stats_of(mine, left_out=NEVER_COMPARED)
    assert told.keys() == stats_of(reference, left_out=NEVER_COMPARED).keys()
    assert all(math.isfinite(stat.get("mean", 0.0)) for stat in told.values())


@pytest.mark.parametrize("case", named(*CASES))
def test_cases_say_what_they_are(run: Callable[..., Path], case: Case) -> None:
    adapter = read(run(case, "ours"), "run_spec.json")["adapter_spec"]
    assert case.is_sampled == (adapter["temperature"] > 0)
    assert case.only_scores == (adapter["max_tokens"] == 0)


class Thinker(FakeEngine):
    """Answers by the prompt; jobs with a rule for thinking begin with a thought that would score otherwise."""

    def answer(self, job: Job) -> Completion:
        answer = ("A", "B.", "Yes, 4", "no\n\nReally", "The answer is 7 ###")[sum(job.prompt) % 5]
        found = [at for stop in job.stop if isinstance(stop, str) and (at := answer.find(stop)) >= 0]
        answer = answer[: min(found)] if found else answer
        thought = f"<think>\nA B C yes {job.prompt[-1]} The answer is 5\n</think>\n\n" if job.thinking else ""
        tokens = [token for text in (thought, answer) for token in self.tokenizer.encode(text)]
        return dataclasses.replace(
            super().answer(job),
            text=thought + answer,
            tokens=tuple(tokens),
            logprobs=tuple(-0.25 for _ in tokens),
            finish_reason="stop",
        )


@pytest.mark.parametrize("case", named(*(case for case in CASES if not case.only_scores)))
def test_no_thinking_reaches_a_metric(run: Callable[..., Path], case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are those of the same answers without a thought."""
    engines.close()  # those that have answered other tests
    monkeypatch.setattr(engines, "load", lambda path, *_: Thinker(AutoTokenizer.from_pretrained(path)))
    mine, reference = run(case, "thinking"), run(case, "answering")
    engines.close()
    states = read(mine, "scenario_state.json")["request_states"]
    outputs = [output for state in states for output in state["result"]["completions"]]
    assert all("The answer is 5" in output["thinking"]["text"] for output in outputs)
    assert texts_of(mine) == texts_of(reference)
    assert_alike(stats_of(mine, left_out=NEVER_COMPARED), stats_of(reference, left_out=NEVER_COMPARED))
