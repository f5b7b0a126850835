"""Protects: the nightly gate fails for what is worse, and for nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_suites import DEPLOYMENT, HARDWARE, MODEL, answers, make_suite, run_name, write_run
from tiny_models import ours, write_entries

from flexgen_helm.run import main
from flexgen_helm.suites.comparison import Comparison, ScoreChange, compare_suites
from flexgen_helm.suites.suite import instance_sums, is_lower_better, read_suite

SUBJECTS = ["anatomy", "astronomy", "virology"]


def compared(before: Path, after: Path, **settings: float) -> Comparison:
    return compare_suites(read_suite(before), read_suite(after), **settings)


def verdicts(comparison: Comparison) -> dict[str, str]:
    """Of the runs, by subject."""
    return {change.name.partition("subject=")[2].partition(",")[0]: change.verdict for change in comparison.scores}


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return make_suite(tmp_path, "before", {subject: answers(50) for subject in SUBJECTS})


@pytest.fixture
def make_after(tmp_path: Path) -> Callable[..., Path]:
    """The suite after `before`: as it was, but for the answers given (None: no such run), and what else is said."""

    def make(name: str = "after", **changes: Any) -> Path:
        record = {key: changes.pop(key) for key in list(changes) if key in ("failed", "recorded", "models", "hardware")}
        told = {subject: answers(50) for subject in SUBJECTS} | changes
        kept = {subject: values for subject, values in told.items() if values is not None}
        return make_suite(tmp_path, name, kept, started="2026-11-22T01:00:00+00:00", **record)

    return make


# Scores


@pytest.mark.parametrize("recorded", [True, False])
def test_a_run_with_failed_requests_fails_however_it_scores(
    before: Path, make_after: Callable[..., Path], recorded: bool
) -> None:
    """As HELM writes them: of plain runs, and of runs that a later sweep skipped as completed, nothing else tells."""
    after = make_after(recorded=recorded)
    states = [{"prompt": 'it said "success": false', "result": {"success": each != 1}} for each in range(3)]
    state = after / run_name("virology") / "scenario_state.json"
    state.write_text(json.dumps({"request_states": states}, indent=2))
    comparison = compared(before, after)
    assert verdicts(comparison) == {"anatomy": "same", "astronomy": "same", "virology": "failed"}
    (failure,) = [each for each in comparison.failures if isinstance(each, ScoreChange)]
    assert failure.reason == "1 of its requests failed and count as empty answers"
    assert main(["compare", str(before), str(after)]) == 1
    assert verdicts(compared(after, before))["virology"] == "same"


def test_equal_suites_pass(before: Path, make_after: Callable[..., Path]) -> None:
    comparison = compared(before, make_after())
    assert verdicts(comparison) == dict.fromkeys(SUBJECTS, "same")
    assert [change.verdict for change in comparison.means] == ["same"]
    assert comparison.num_tests == 4
    assert comparison.failures == []


def test_a_score_that_fell_fails_and_one_that_rose_is_told(before: Path, make_after: Callable[..., Path]) -> None:
    comparison = compared(before, make_after(anatomy=answers(25), virology=answers(80)))
    assert verdicts(comparison) == {"anatomy": "worse", "astronomy": "same", "virology": "better"}
    anatomy, _, virology = comparison.scores
    assert (anatomy.before, anatomy.after, anatomy.instances, anatomy.changed) == (0.5, 0.25, 100, 25)
    assert anatomy.how == "paired"
    assert anatomy.low is not None
    assert anatomy.high is not None
    assert anatomy.low < -0.25 < anatomy.high < 0
    assert virology.difference == pytest.approx(0.3)
    assert [change.name for change in comparison.failures] == [run_name("anatomy")]


def test_chance_is_no_change(before: Path, make_after: Callable[..., Path]) -> None:
    """Two more wrong of a hundred; and as many right as before, but others."""
    comparison = compared(before, make_after(anatomy=answers(48), virology=answers(50, seed="other")))
    assert verdicts(comparison) == dict.fromkeys(SUBJECTS, "same")
    assert comparison.scores[2].changed > 30


def test_the_number_of_scores_is_corrected_for(tmp_path: Path) -> None:
    """Eight of a hundred answers lost: significant alone, but not as one of 30 scores."""
    one = [make_suite(tmp_path, name, {"anatomy": answers(n)}) for name, n in (("a", 50), ("b", 42))]
    assert verdicts(compared(*one)) == {"anatomy": "worse"}
    others = {f"subject_{n}": answers(50) for n in range(29)}
    many = [make_suite(tmp_path, name, {"anatomy": answers(n)} | others) for name, n in (("c", 50), ("d", 42))]
    comparison = compared(*many)
    assert set(verdicts(comparison).values()) == {"same"}
    assert comparison.num_tests == 31
    assert comparison.scores[0].p_value == pytest.approx(31 * 2**-7, rel=0.1)  # no less than a sign test of eight


def test_small_losses_everywhere_fail_by_their_mean(tmp_path: Path) -> None:
    subjects = [f"subject_{n}" for n in range(10)]
    comparison = compared(
        make_suite(tmp_path, "a", {subject: answers(50) for subject in subjects}),
        make_suite(tmp_path, "b", {subject: answers(47) for subject in subjects}),
    )
    assert set(verdicts(comparison).values()) == {"same"}
    (mean,) = comparison.failures
    assert (mean.name, mean.verdict) == ("mean of 10 runs of local/tiny", "worse")
    assert (mean.before, mean.after) == (pytest.approx(0.5), pytest.approx(0.47))


def test_other_instances_are_compared_unpaired(before: Path, make_after: Callable[..., Path]) -> None:
    comparison = compared(before, make_after(anatomy=answers(60, of=140), virology=answers(20, of=120)))
    assert verdicts(comparison) == {"anatomy": "same", "astronomy": "same", "virology": "worse"}
    assert [change.how for change in comparison.scores] == ["unpaired", "paired", "unpaired"]


def test_where_lower_is_better_a_rise_is_worse(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.2), ("c", 0.8)):
        write_run(tmp_path / name, "books", [value + n / 1000 for n in range(30)], metric="bits_per_byte")
        file = tmp_path / name / run_name("books") / "per_instance_stats.json"
        entries = json.loads(file.read_text())
        for entry in entries:
            (stat,) = entry["stats"]
            bits = stat["sum"]
            entry["stats"] = [
                {"name": {"name": key, "split": "test"}, "count": 1, "sum": total}
                for key, total in (("logprob", -bits * 80 * 0.6931471805599453), ("num_bytes", 80))
            ]
        file.write_text(json.dumps(entries))
    assert verdicts(compared(tmp_path / "a", tmp_path / "b")) == {"books": "worse"}
    comparison = compared(tmp_path / "a", tmp_path / "c")
    assert verdicts(comparison) == {"books": "better"}
    assert comparison.scores[0].low == pytest.approx(-0.2, abs=1e-9)


def test_a_score_without_values_per_instance(tmp_path: Path) -> None:
    for name, right in (("a", 50), ("b", 46), ("c", 20)):
        write_run(tmp_path / name, "beer", answers(right), per_instance=False)
    comparison = compared(tmp_path / "a", tmp_path / "b")
    assert verdicts(comparison) == {"beer": "same"}
    assert comparison.scores[0].how == "whole"
    assert verdicts(compared(tmp_path / "a", tmp_path / "c")) == {"beer": "worse"}


# Runs that are not there


def test_missing_failed_and_new_runs(before: Path, make_after: Callable[..., Path]) -> None:
    after = make_after(anatomy=None, virology=None, failed={"virology": "no luck"}, marketing=answers(30))
    comparison = compared(before, after)
    assert verdicts(comparison) == {"anatomy": "missing", "astronomy": "same", "marketing": "new", "virology": "failed"}
    assert {change.name: change.reason for change in comparison.failures if hasattr(change, "metric")} == {
        run_name("anatomy"): "not in this suite",
        run_name("virology"): "no luck",
    }


def test_a_run_that_failed_before_too_fails_still(before: Path, make_after: Callable[..., Path]) -> None:
    after = make_after(virology=None, failed={"virology": "no luck"})
    again = make_after("again", virology=None, failed={"virology": "no luck"})
    comparison = compared(after, again)
    assert verdicts(comparison)["virology"] == "failed"
    assert comparison.scores[2].reason == "no luck (as before)"
    assert verdicts(compared(again, before))["virology"] == "new"


@pytest.mark.parametrize("content", ["", "{", "[]", '[{"name": 3}]', None])
def test_a_run_whose_files_are_broken_has_failed(before: Path, make_after: Callable[..., Path], content: str) -> None:
    after = make_after(recorded=False)
    file = after / run_name("anatomy") / "stats.json"
    file.unlink() if content is None else file.write_text(content)
    assert verdicts(compared(before, after))["anatomy"] in ("failed", "unscored")


def test_the_order_of_arguments_in_a_name_does_not_matter(tmp_path: Path) -> None:
    """HELM's names have the order in which arguments were given."""
    one, two = (make_suite(tmp_path, name, {"anatomy": answers(50)}, recorded=False) for name in "ab")
    (run,) = two.iterdir()
    first, model, deployment = run.name.removeprefix("mmlu:").split(",")
    run.rename(two / f"mmlu:{model},{deployment},{first}")
    (change,) = compare_suites(read_suite(one), read_suite(two)).scores
    assert change.verdict == "same"


def test_another_deployment_of_the_model_is_the_same_work(before: Path, tmp_path: Path) -> None:
    for subject in SUBJECTS:
        write_run(tmp_path / "stock", subject, answers(50), deployment="huggingface/tiny")
    assert verdicts(compared(before, tmp_path / "stock")) == dict.fromkeys(SUBJECTS, "same")


# Speed


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"seconds": 109.0}, "same"),
        ({"seconds": 112.0}, "slower"),
        ({"seconds": 80.0}, "faster"),
        ({"seconds": 112.0, "new_tokens": 6000}, "same"),  # more work in more time
        ({"seconds": 300.0, "computed": 100}, "not compared"),
        ({"seconds": 300.0, "prompt_tokens": 80_000}, "not compared"),
        ({"seconds": 0.1, "computed": 0}, "not compared"),
    ],
)
def test_a_model_is_slower_on_the_same_work(
    before: Path, make_after: Callable[..., Path], change: dict[str, Any], verdict: str
) -> None:
    comparison = compared(before, make_after(models=(replace(MODEL, **change),)))
    (speed,) = comparison.speeds
    assert speed.verdict == verdict
    assert speed.before == 400.0
    assert bool(comparison.failures) == (verdict == "slower")
    assert bool(speed.reason) == (verdict == "not compared")


def test_other_hardware_is_not_compared(before: Path, make_after: Callable[..., Path]) -> None:
    slow = (replace(MODEL, seconds=1000.0),)
    for name, hardware in (("small", replace(HARDWARE, device="T4")), ("few", replace(HARDWARE, cores=2))):
        comparison = compared(before, make_after(name, models=slow, hardware=hardware))
        assert [speed.verdict for speed in comparison.speeds] == ["not compared"]
        assert "other hardware" in comparison.speeds[0].reason
    moved = replace(HARDWARE, host="other", host_memory_bytes=HARDWARE.host_memory_bytes - 10**6)
    assert compared(before, make_after("moved", models=slow, hardware=moved)).failures


def test_the_threshold_is_the_users(before: Path, make_after: Callable[..., Path]) -> None:
    after = make_after(models=(replace(MODEL, seconds=112.0),))
    assert compared(before, after, slowdown=0.2).failures == []
    assert compared(before, after, slowdown=0.0).failures != []


# The command


def test_the_command(before: Path, make_after: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    after = make_after(
        anatomy=answers(25), astronomy=answers(49), virology=None, failed={"virology": "no luck"},
        models=(replace(MODEL, seconds=200.0),),
    )  # fmt: skip
    assert main(["compare", str(before), str(after), "--json", str(tmp_path / "found.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "before -> after"
    order = [line.split()[1] for line in lines if line.startswith(("WORSE", "FAILED "))]
    assert order == ["mmlu:subject=virology", "mmlu:subject=anatomy", "mean"]
    assert any(line.split() == ["SLOWER", DEPLOYMENT, "400.0", "200.0", "-50.0%"] for line in lines)
    assert lines[-1] == "FAILED: 2 worse, 1 failed, 1 slower (3 scores compared at 95%, corrected for their number)"
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["failed"] is True
    assert [each["verdict"] for each in found["scores"]] == ["worse", "same", "failed"]
    assert found["speeds"][0]["change"] == -0.5
    assert main(["compare", str(before), str(before)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("passed: nothing is worse (4 scores")


def test_suites_by_name(before: Path, make_after: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    make_after(anatomy=answers(25))
    (tmp_path / "output").mkdir()
    shutil.move(before, tmp_path / "output" / "runs" / "before")
    shutil.move(tmp_path / "after", tmp_path / "output" / "runs" / "after")
    assert main(["compare", "before", "after", "-o", str(tmp_path / "output")]) == 1
    assert main(["compare", "after", "before", "-o", str(tmp_path / "output")]) == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["before", "nowhere"], "there is no suite nowhere"),
        (["before", "empty"], "empty holds no runs of HELM and no flexgen_sweep.json"),
        (["before", "corrupt"], "flexgen_sweep.json is not JSON"),
        (["before", "before", "--slowdown", "1.5"], "--slowdown 1.5 is not a share"),
        (["before", "before", "--confidence", "95"], "--confidence 95.0 is not a share"),
        (["before", "before", "--confidence", "nan"], "--confidence nan is not a share"),
        (["before", "before", "--json", "nowhere/x"], "there is no directory nowhere"),
        (["before", "before", "--json", "."], "--json . is a directory"),
        (["before"], "required: B"),
    ],
)
def test_bad_input(
    before: Path, tmp_path: Path, arguments: list[str], line: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty" / "eval_cache").mkdir(parents=True)
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "flexgen_sweep.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    told = capsys.readouterr().err
    assert line in told
    assert told.count("\n") == 1


# What HELM itself wrote

ENTRIES = [
    "mmlu:subject=anatomy",
    "commonsense:dataset=hellaswag,method=multiple_choice_separate_original",
    "wikitext_103",
    "synthetic_reasoning_natural:difficulty=easy",
]


@pytest.fixture(scope="module")
def real(
    helm_data: Path,
    tiny_llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A suite of helm-run with a tiny model."""
    from helm.benchmark import run

    folder = tmp_path_factory.mktemp("real")
    write_entries(folder / "prod_env", "local/compared", tiny_llama, ours=ours(tiny_llama))
    entries = [f"{entry}{',' if ':' in entry else ':'}model=local/compared" for entry in ENTRIES]
    runner = "flexgen_helm.runner.FlexGenRunner"
    places = ["-o", str(helm_data), "--local-path", str(folder / "prod_env"), "--suite", "compared"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = ["-r", *entries, "-m", "6", "-n", "1", "--disable-cache", "--runner-class-name", runner, *places]
        run.helm_run(run.build_parser().parse_args(arguments))
    return helm_data / "runs" / "compared"


def test_what_helm_wrote_is_read(real: Path) -> None:
    """Sums over instances give the very score that HELM tells, each metric in its own way."""
    suite = read_suite(real)
    assert len(suite.runs) == 4
    assert {run.score.metric for run in suite.runs.values() if run.score} >= {"exact_match", "bits_per_byte"}
    for run in suite.runs.values():
        assert run.model == "local/compared"
        assert run.value is not None
        sums = instance_sums(run)
        assert sums is not None
        assert sum(one for one, _ in sums.values()) / sum(other for _, other in sums.values()) == pytest.approx(
            run.value
        )
        assert is_lower_better(run) == (run.score is not None and run.score.metric == "bits_per_byte")


def test_real_suites_are_compared(real: Path, tmp_path: Path) -> None:
    assert main(["compare", str(real), str(real)]) == 0
    shutil.copytree(real, tmp_path / "worse")
    for file in (tmp_path / "worse").glob("wikitext*/*stats.json"):
        file.write_text(file.read_text().replace('"name": "logprob"', '"name": "lost"'))
    assert main(["compare", str(real), str(tmp_path / "worse")]) == 0  # the score is as it was; so are its documents
    next((tmp_path / "worse").glob("mmlu*/stats.json")).unlink()
    assert main(["compare", str(real), str(tmp_path / "worse")]) == 1


def test_an_error_gives_no_commands_to_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "été\x1b]0;title\x07\x9b", "other"]) == 2
    assert "no suite été\\x1b]0;title\\x07\\x9b:" in capsys.readouterr().err
