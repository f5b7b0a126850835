"""Protects: runs that a model judges are judged by the one that is named, under its name, and never by what it left."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import leaderboard_data
import pytest
from fake_engine import FakeEngine
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.annotation.annotator_factory import AnnotatorFactory
from helm.benchmark.annotation.model_as_judge import AnnotatorModelInfo
from helm.common.cache_backend_config import BlackHoleCacheBackendConfig
from helm.common.codec import from_json
from judges import CHAT_TEMPLATE, CUT_OFF, UNREADABLE, Asked, JudgeEngine, mean, verdict_on
from leaderboard_data import NUM_EXAMPLES
from stats import read
from sweeping import SUITE_FILES, differences
from tables import summarized
from tiny_models import random_llama, save_tiny_model

from engine import Completion, EngineError
from engine.errors import NumericsError
from flexgen_helm.helm.engines import engines
from flexgen_helm.helm.scores import choose
from flexgen_helm.summarizer import JudgedSummarizer
from flexgen_helm.sweeps.record import SweepRecord, read_record

Cli = Callable[..., int]
NAME = "local_tiny-judge"
API_NAMES = ("gpt", "claude", "openai")


def wide(tokenizer: Any) -> Any:
    """`random_llama` with room for a template of HELM's and the answer in it."""
    model = random_llama(tokenizer)
    model.config.max_position_embeddings = 1 << 15
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("judged")
    return {
        name: save_tiny_model(folder / name, wide, chat_template=CHAT_TEMPLATE) for name in ("tiny-model", "tiny-judge")
    }


@pytest.fixture(scope="module")
def leaderboards(helm_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `datasets` with data of the leaderboards, whose files are in `helm_data`."""
    folder = tmp_path_factory.mktemp("datasets")
    leaderboard_data.place_leaderboards(helm_data, folder)
    return folder


@pytest.fixture
def cli(cli: Cli, leaderboards: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line with the data of the leaderboards, and of a benchmark that a jury judges."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", leaderboards)
    leaderboard_data.place_jury_benchmark(Path())
    return cli


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeEngine]]:
    """The engines in the order of loading: tiny-judge gives verdicts, others answer anything."""
    from transformers import AutoTokenizer

    found: list[FakeEngine] = []

    def load(path: str, policy: object, window: int | None = None) -> FakeEngine:
        assert all(engine.closed for engine in found), "one engine at a time"
        kind = JudgeEngine if Path(path).name == "tiny-judge" else FakeEngine
        found.append(kind(AutoTokenizer.from_pretrained(path)))
        return found[-1]

    engines.close()
    monkeypatch.setattr(engines, "load", load)
    yield found
    engines.close()


def suite(name: str) -> Path:
    return Path("benchmark_output/runs") / name


def record_of(name: str) -> SweepRecord:
    found = read_record(suite(name))
    assert found is not None
    return found


def conf(*entries: str) -> str:
    listed = "\n".join(f'{{description: "{each}", priority: 1}}' for each in entries)
    Path("judged.conf").write_text(f"entries: [{listed}]")
    return "judged.conf"


def run_of(name: str, entry: str) -> Path:
    (found,) = (path for path in suite(name).iterdir() if path.name.startswith(entry.split(":")[0]))
    return found


def stat(run: Path, name: str) -> dict[str, Any]:
    """A statistic of a run's test split, over all of it."""
    (found,) = (
        each
        for each in read(run, "stats.json")
        if each["name"] == {"name": name, "split": each["name"].get("split")} and each["name"]["split"] == "test"
    )
    return dict(found)


def num_instances_with(run: Path, name: str) -> int:
    """Instances of a run that have a statistic."""
    instances = read(run, "per_instance_stats.json")
    return sum(any(each["name"]["name"] == name for each in instance["stats"]) for instance in instances)


def as_helm_annotates(run: Path, folder: Path) -> list[dict[str, Any]]:
    """What HELM's own annotator makes of a run's answers, asking one at a time; nothing where it cannot read."""
    state = from_json((run / "scenario_state.json").read_text(), ScenarioState)
    factory = AnnotatorFactory({}, str(folder), BlackHoleCacheBackendConfig())
    (spec,) = state.annotator_specs
    args = {**spec.args, "auto_client": Asked()}
    if "annotator_models" in args:
        args["annotator_models"] = {name: AnnotatorModelInfo(**told) for name, told in args["annotator_models"].items()}
    annotator = factory.get_annotator(type(spec)(spec.class_name, args))
    annotations = []
    for each in state.request_states:
        try:
            annotations.append(annotator.annotate(each))
        except Exception:
            annotations.append({})
    return annotations


HARM_BENCH = "harm_bench:increase_max_tokens=-480"
WILDBENCH = "wildbench:subset=v2,increase_max_tokens=-1960"
ENTRIES = {  # entry: the statistic that scores it, and the score that an annotation means
    "wildbench:subset=v2,increase_max_tokens=-1960": (
        "wildbench_score_rescaled",
        lambda told: _scaled(told.get("gpt_score")),
    ),
    "omni_math:increase_max_tokens=-4060": ("omni_math_accuracy", lambda told: told.get("gpt_equivalence_judgement")),
    HARM_BENCH: ("safety_score", lambda told: told.get("gpt_score")),
    "air_bench_2024": ("air_score", lambda told: told.get("score")),
    leaderboard_data.JURY_BENCHMARK: ("jury_score", lambda told: _of_jury(told.get(NAME))),
}


def _scaled(score: float | None) -> float | None:
    return None if score is None else (score - 1) / 9


def _of_jury(told: dict[str, Any] | None) -> float | None:
    return None if told is None else mean([each["score"] for each in told.values()])


def test_scores_are_those_of_helms_annotators_by_the_verdicts_that_can_be_read(
    cli: Cli,
    models: dict[str, Path],
    loaded: list[FakeEngine],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("helm"), "propagate", True)
    leaderboard_data.place_judge_prompts(Path("prod_env/cache"))
    arguments = ("--model", models["tiny-model"], "--judge", models["tiny-judge"], "--suite", "judged")
    with caplog.at_level("WARNING", "helm"):
        assert cli("sweep", conf(*ENTRIES), *arguments) == 0
    assert not any(UNREADABLE in told for told in caplog.messages), "answers of models are no log"
    out = capsys.readouterr().out
    model, judge = loaded
    assert isinstance(judge, JudgeEngine)
    assert len(model.calls) == len(judge.calls) == 1, "all that is asked rides together"
    recorded = {run.name: run for run in record_of("judged").runs}
    unreadable = 0
    means, shares = [], []
    for entry, (metric, score_of) in ENTRIES.items():
        run = run_of("judged", entry)
        assert run.name.endswith(f",judge={NAME}")
        assert {file.name for file in run.iterdir()} == set(SUITE_FILES)
        scores = [score_of(told) for told in as_helm_annotates(run, Path("prod_env/cache"))]
        is_read = [score is not None for score in scores]
        assert 0 < sum(is_read) < len(scores), f"{entry}: choose other data, so that some can be read and some cannot"
        told = stat(run, metric)
        expected = mean([score for score in scores if score is not None])
        assert told["mean"] == pytest.approx(expected)
        assert num_instances_with(run, metric) == sum(is_read)
        means.append(expected)
        shares.append(sum(is_read) / len(scores))
        share = stat(run, f"judge_{NAME}_verdict_read")
        assert share["mean"] == pytest.approx(sum(is_read) / len(scores))
        assert num_instances_with(run, f"judge_{NAME}_verdict_read") == len(scores)
        assert stat(run, "num_instances")["sum"] == len(scores), "what needs no verdict is of all answers"
        states = read(run, "scenario_state.json")["request_states"]
        annotations = [next(iter(state["annotations"].values())) for state in states]
        assert [each["verdict"] == "read" for each in annotations] == is_read
        assert {each["judge"] for each in annotations} == {"local/tiny-judge"}
        assert {each["response_text"] for each in annotations if each["verdict"] == "unreadable"} == {UNREADABLE}
        missing = is_read.count(False)
        unreadable += missing
        assert (recorded[run.name].verdicts, recorded[run.name].unreadable_verdicts) == (len(scores), missing)
        assert f"of {len(scores)} verdicts {missing} could not be read" in out
        names = [each["name"] for each in read(run, "stats.json")]
        names += [each["name"] for instance in read(run, "per_instance_stats.json") for each in instance["stats"]]
        keys = json.dumps([list(map(list, annotations)), names])
        assert not any(name in keys for name in API_NAMES), "nothing under the name of the model whose place it took"
        assert read(run, "flexgen_run.json")["judge"]["deployment"] == "flexgen/tiny-judge"
    assert sum(verdict_on(prompt) == UNREADABLE for prompt in judge.asked) == unreadable
    page = (suite("judged") / "report.html").read_text()
    assert page.count("these answers score nothing") == len(ENTRIES)
    found = record_of("judged").judge
    assert found is not None
    assert (found.deployment, found.computed) == ("flexgen/tiny-judge", len(judge.asked))
    assert [each.deployment for each in record_of("judged").models] == ["flexgen/tiny-model"]

    cells = summarized(suite("judged"), "capabilities", "core_scenarios").cells
    assert [cells["WildBench - WB Score"], cells["Omni-MATH - Acc"]] == pytest.approx(means[:2])
    assert cells["Mean score"] == pytest.approx(mean(means[:2]))
    assert summarized(suite("judged"), "safety", "harm_bench").cells["LM Evaluated Safety score"] == means[2]
    told = summarized(suite("judged"), "safety", "harm_bench", JudgedSummarizer)
    assert told.cells[f"LM Evaluated Safety score by {NAME}"] == means[2]
    assert told.cells["Verdicts read"] == pytest.approx(shares[2])
    assert told.cells["# eval"] == NUM_EXAMPLES
    assert not any("GPT" in words or "Llama" in words for words in (*told.cells, *told.descriptions.values()))


def test_a_judged_run_without_a_readable_verdict_has_no_score() -> None:
    """Omni-MATH has log-probabilities of its answers, too; they are not what it is for."""

    def told(*names: str) -> list[dict[str, Any]]:
        return [{"name": {"name": name, "split": "test"}, "count": 1, "sum": 3.0, "mean": 0.25} for name in names]

    common, judged = ("num_instances", "bits_per_byte"), "judge_local_tiny_verdict_read"
    for names, metric, value in (
        ((*common, judged), "omni_math_accuracy", None),
        ((*common, judged, "omni_math_accuracy"), "omni_math_accuracy", 0.25),
        (common, "bits_per_byte", 0.25),
    ):
        found = choose(told(*names), "run", "model", "omni_math_accuracy", "test")
        assert (found.metric, found.value) == (metric, value)


def test_runs_wait_for_a_judge_who_comes_later_and_nothing_is_answered_again(
    cli: Cli, models: dict[str, Path], loaded: list[FakeEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    entries = conf(HARM_BENCH, "xstest:increase_max_tokens=-480", "medcalc_bench")
    arguments = ("sweep", entries, "--model", models["tiny-model"], "-m", 4)
    assert cli(*arguments, "--suite", "later") == 0
    out = capsys.readouterr().out
    assert "suite later: 1 done, 0 failed, 0 skipped, 2 unjudged" in out
    assert "unjudged: harm_bench, xstest; they are answered" in out
    assert [run.status for run in record_of("later").runs] == ["unjudged", "unjudged", "done"]
    held = run_of("later", "harm_bench")
    assert {file.name for file in held.iterdir()} == {"run_spec.json", "scenario.json", "scenario_state.json"}
    answers = [state["result"]["completions"] for state in read(held, "scenario_state.json")["request_states"]]

    judged = (*arguments, "--judge", models["tiny-judge"])
    assert cli(*judged, "--suite", "later") == 0
    model, judge = loaded
    assert (len(model.calls), len(judge.calls)) == (1, 1)
    run = run_of("later", "harm_bench")  # the one that was held is gone
    assert run.name == f"{held.name},judge={NAME}"
    assert [state["result"]["completions"] for state in read(run, "scenario_state.json")["request_states"]] == answers
    out = capsys.readouterr().out
    assert "unjudged" not in out
    told = stat(run_of("later", "xstest"), "safety_score")["mean"]  # HELM's scenario does not name its main metric
    assert re.search(rf"^xstest:judge={NAME} .*safety_score +test +4 +{told:.3f}$", out, re.MULTILINE)

    assert cli(*judged, "--suite", "later", "--skip-completed-runs") == 0
    assert "0 done, 0 failed, 3 skipped" in capsys.readouterr().out
    Path("placed.yaml").write_text("gpu-batch-size: 3")
    assert cli(*judged, "--suite", "later", "--skip-completed-runs", "--judge-policy", "placed.yaml") == 0
    assert "0 done, 0 failed, 3 skipped" in capsys.readouterr().out
    Path("other.yaml").write_text("dtype: float32")
    assert cli(*judged, "--suite", "later", "--skip-completed-runs", "--judge-policy", "other.yaml") == 0
    assert "2 done, 0 failed, 1 skipped" in capsys.readouterr().out
    assert cli(*judged, "--suite", "at_once", "--local-path", "elsewhere") == 0
    assert differences(suite("later"), suite("at_once")) == []


def test_a_judge_that_fails_is_asked_what_is_left_by_the_same_command(
    cli: Cli, models: dict[str, Path], loaded: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("sweep", conf(HARM_BENCH), "--model", models["tiny-model"], "--judge", models["tiny-judge"])
    with monkeypatch.context() as patch:
        patch.setattr(JudgeEngine, "__init__", _ill)
        assert cli(*arguments, "--suite", "again") == 1
    assert [run.status for run in record_of("again").runs] == ["failed"]
    assert "the judge is ill" in str(record_of("again").runs[0].error)
    assert not (run_of("again", "harm_bench") / "stats.json").exists()
    engines.close()  # as the process does
    assert cli(*arguments, "--suite", "again") == 0
    model, ill, judge = loaded
    assert len(model.calls) == 1
    assert isinstance(ill, JudgeEngine)
    assert isinstance(judge, JudgeEngine)
    assert len(ill.asked) == 2
    assert not set(ill.asked) & set(judge.asked)
    assert cli(*arguments, "--suite", "whole", "--local-path", "elsewhere") == 0
    assert differences(suite("again"), suite("whole")) == []


@pytest.mark.parametrize("is_judged", [True, False])
def test_an_annotator_that_lacks_a_package_fails_its_run_alone(
    cli: Cli,
    models: dict[str, Path],
    loaded: list[FakeEngine],
    is_judged: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "gradio_client", None)
    monkeypatch.delitem(sys.modules, "helm.benchmark.annotation.bigcodebench_annotator", raising=False)
    judge = ("--judge", models["tiny-judge"]) if is_judged else ()
    entries = conf("medcalc_bench", "bigcodebench:version=v0.1.2,increase_max_tokens=-4000")
    assert cli("sweep", entries, "--model", models["tiny-model"], "-m", 2, *judge, "--suite", "lacks") == 1
    assert [run.status for run in record_of("lacks").runs] == ["done", "failed"]
    said = "annotator BigCodeBenchAnnotator needs the package gradio_client; run `pip install gradio_client`"
    assert str(record_of("lacks").runs[1].error).endswith(said)
    assert said in capsys.readouterr().out


def test_a_score_that_is_cut_off_is_none(
    cli: Cli, models: dict[str, Path], loaded: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HELM's annotator reads one."""
    leaderboard_data.place_judge_prompts(Path("prod_env/cache"))
    monkeypatch.setattr("judges.verdict_on", lambda prompt: CUT_OFF)
    arguments = ("--model", models["tiny-model"], "--judge", models["tiny-judge"], "-m", 2, "--suite", "cut")
    assert cli("sweep", conf("air_bench_2024"), *arguments) == 0
    assert {told["score"] for told in as_helm_annotates(run_of("cut", "air_bench"), Path("prod_env/cache"))} == {0.0}
    (run,) = record_of("cut").runs
    assert (run.verdicts, run.unreadable_verdicts) == (2, 2)
    names = [each["name"]["name"] for each in read(run_of("cut", "air_bench"), "stats.json")]
    assert "num_instances" in names
    assert "air_score" not in names


def test_what_a_model_left_unanswered_is_recorded_when_it_is_judged(
    cli: Cli, models: dict[str, Path], loaded: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Be it judged, or left unjudged because the judge fails."""
    answer, asked = FakeEngine.answer, list[object]()

    def once_without(self: FakeEngine, job: Any) -> Any:
        asked.append(job)
        return Completion(error=NumericsError("not finite")) if len(asked) == 1 else answer(self, job)

    monkeypatch.setattr(FakeEngine, "answer", once_without)
    arguments = ("sweep", conf(HARM_BENCH), "--model", models["tiny-model"], "--judge", models["tiny-judge"], "-m", 4)
    assert cli(*arguments, "--suite", "judged") == 1
    assert [(run.status, run.failed_requests) for run in record_of("judged").runs] == [("done", 1)]
    asked.clear()
    engines.close()
    monkeypatch.setattr(JudgeEngine, "__init__", _ill)
    assert cli(*arguments, "--suite", "ill", "--local-path", "elsewhere") == 1
    assert [(run.status, run.failed_requests) for run in record_of("ill").runs] == [("failed", 1)]


def _ill(self: JudgeEngine, tokenizer: Any) -> None:
    FakeEngine.__init__(self, tokenizer)
    self.asked = []
    self.fault, self.fault_after = EngineError("the judge is ill"), 2


def test_a_model_may_judge_itself_by_one_engine(cli: Cli, models: dict[str, Path], loaded: list[FakeEngine]) -> None:
    """Though only a run entry names it; it keeps its policy."""
    judge = models["tiny-judge"]
    entries = conf(f"{HARM_BENCH},model={judge}")
    Path("policy.yaml").write_text("batch-invariant: true")
    # As a model, it answers what is no request of an annotator's.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("judges.verdict_on", lambda prompt: "<reasoning>so</reasoning><score>1</score>")
        arguments = ("--policy", "policy.yaml", "--judge", judge, "-m", 3, "--suite", "itself")
        assert cli("sweep", entries, *arguments) == 0
    assert [len(engine.calls) for engine in loaded] == [2]
    assert record_of("itself").models[0].policy["batch-invariant"] is True
    run = run_of("itself", "harm_bench")
    assert stat(run, "safety_score")["mean"] == stat(run, f"safety_{NAME}_score")["mean"] == 1.0


def test_what_a_judge_has_no_room_for_is_counted_and_scores_nothing(
    cli: Cli, models: dict[str, Path], loaded: list[FakeEngine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def narrow(tokenizer: Any) -> Any:
        return random_llama(tokenizer)  # a window of 512 tokens

    judge = save_tiny_model(tmp_path / "tiny-narrow", narrow, chat_template=CHAT_TEMPLATE)
    arguments = ("--model", models["tiny-model"], "--judge", judge, "-m", 3, "--suite", "narrow")
    assert cli("sweep", conf(HARM_BENCH), *arguments) == 0
    assert "of 3 verdicts 3 were not given; these answers score nothing" in capsys.readouterr().out
    run = run_of("narrow", "harm_bench")
    assert stat(run, "judge_local_tiny-narrow_verdict_read")["mean"] == 0
    assert not any("safety_score" in json.dumps(each["name"]) for each in read(run, "stats.json"))
    (told, *_) = (state["annotations"]["harm_bench"] for state in read(run, "scenario_state.json")["request_states"])
    assert told["verdict"] == "unanswered"
    assert "512" in told["error"]


def test_other_commands_ask_no_judge_unsaid(
    cli: Cli, models: dict[str, Path], loaded: list[FakeEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    """`run` asks as HELM does, and says so; what judges were asked is not made again."""
    common = ("--model", models["tiny-model"], "-m", 2)
    assert cli("run", "-r", HARM_BENCH, *common, "--suite", "as_helm") == 1
    told = capsys.readouterr().err
    assert "HELM asks the models that its annotators name for verdicts" in told
    assert "openai" in told
    assert cli("sweep", conf(HARM_BENCH), *common, "--judge", models["tiny-judge"], "--suite", "judged") == 0
    assert cli("reproduce", run_of("judged", "harm_bench")) == 2
    assert "was judged by another model" in capsys.readouterr().err


def test_a_judge_never_takes_the_place_of_a_model_that_a_run_entry_names(
    cli: Cli, models: dict[str, Path], loaded: list[FakeEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("sweep", conf(f"{HARM_BENCH},model={models['tiny-judge']}"), "--suite", "bad")
    assert cli(*arguments, "--judge", models["tiny-judge"], "--judge-policy", "auto") == 2
    assert "is the model that is judged" in capsys.readouterr().err
    assert cli(*arguments, "--judge", "local/tiny-judge") == 2
    assert "are both flexgen/tiny-judge" in capsys.readouterr().err
    assert loaded == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--judge", "{tiny_llama}"), "has no chat template"),
        (("--judge-policy", "auto"), "give --judge too"),
        (("--judge", "{tiny-model}", "--judge-policy", "auto"), "is the model that is judged"),
        (("--judge", "{tiny-judge}", "--apply-chat-template", "no", "-r", "live_qa"), "LiveQAAnnotator"),
        (("--judge", "no-such-model"), "no-such-model"),
        (("--judge", "{tiny-judge}", "--judge-policy", "small.yaml"), "tiny-judge does not fit under its policy: "),
    ],
)
def test_what_cannot_judge_is_refused_before_anything_is_written(
    cli: Cli,
    models: dict[str, Path],
    tiny_llama: Path,
    loaded: list[FakeEngine],
    arguments: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = {"{tiny_llama}": tiny_llama, **{f"{{{name}}}": path for name, path in models.items()}}
    given = [paths.get(each, each) for each in arguments]
    Path("small.yaml").write_text("cpu-memory: 1MB")
    entries, before = conf(HARM_BENCH), sorted(Path().rglob("*"))
    assert cli("sweep", entries, "--model", models["tiny-model"], *given, "--suite", "bad") == 2
    assert said in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before
    assert loaded == []
