"""Protects: a report says what the files say, whatever is missing or named, in a page that needs nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from html_page import Page
from hypothesis import given, settings
from hypothesis import strategies as st
from made_suites import DEPLOYMENT, HARDWARE, MODEL, answers, make_suite, run_name, write_run

from engine.errors import ConfigError
from flexgen_helm.commands.report import write_report
from flexgen_helm.helm.scores import distinct_names
from flexgen_helm.reports.words import MINUS
from flexgen_helm.run import main
from flexgen_helm.sweeps.record import FILE_NAME, RunRecord, SweepRecord, write_record


def night(day: int, hour: int = 1) -> str:
    return f"2026-11-{day:02}T{hour:02}:00:00+00:00"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """A suite of the `day`th, whose runs scored so many of 100."""

    def make(day: int, *, seconds: float = 100.0, more: dict[str, Any] | None = None, **right: int) -> Path:
        scores = {subject: answers(count) for subject, count in right.items()}
        record = {"models": (replace(MODEL, seconds=seconds),), **(more or {})}
        return make_suite(tmp_path / "runs", f"nightly-{day}", scores, started=night(day), **record)

    return make


def written(suite: Path, **others: Any) -> tuple[Page, dict[str, Any]]:
    """Both files of a suite's report, read."""
    path = write_report(suite, **others)
    assert path == suite / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    page.assert_self_contained()
    found = json.loads((suite / "report.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return page, found


def test_a_report_says_what_the_files_say(make: Callable[..., Path]) -> None:
    make(20, anatomy=50, virology=40)
    suite = make(21, seconds=125.0, more={"failed": {"astronomy": "ExecutorError: no luck"}}, anatomy=20, virology=42)
    page, found = written(suite)
    assert (found["version"], found["suite"], found["status"]) == (1, "nightly-21", "finished")
    assert found["previous"] == "nightly-20"
    runs = {run["name"]: run for run in found["runs"]}
    anatomy, virology, astronomy = (runs[run_name(each)] for each in ("anatomy", "virology", "astronomy"))
    assert (anatomy["score"], anatomy["previous"], anatomy["change"]["verdict"]) == (0.2, 0.5, "worse")
    assert (virology["score"], virology["previous"], virology["change"]["verdict"]) == (0.42, 0.4, "same")
    assert (astronomy["score"], astronomy["status"]) == (None, "failed")
    assert (anatomy["metric"], anatomy["split"], anatomy["instances"]) == ("exact_match", "test", 100)
    assert anatomy["trend"] == [0.5, 0.2]
    (model,) = found["models"]
    assert model["tokens_per_second"] == 320.0
    assert (model["previous"], model["verdict"]) == (400.0, "slower")
    assert model["record"]["time_split"] == {"load": 20, "prefill": 60, "decode": 15, "host": 5}
    assert found["hardware"]["device"] == HARDWARE.device
    assert found["regressions"] == sorted(
        [run_name("anatomy"), run_name("astronomy"), DEPLOYMENT, "mean of 2 runs of local/tiny"]
    )
    for words in (
        "nightly-21", "4 regressions against nightly-20", "ExecutorError: no luck", "0.200", f"{MINUS}0.300", "320",
        "80% of the hardware's limit", "load 20 s, 20%", "prefill 1 min, 60%", "percent: [20, 80, 0, 100, 0, 100]",
        HARDWARE.device, "local/tiny", "crfm-helm", "2.14.1", "abc123", "30,000 (76%)", "21 November 2026, 01:00 UTC",
    ):  # fmt: skip
        assert words in page.text, words


def test_the_previous_suite_is_the_latest_earlier_sweep_with_runs_in_common(make: Callable[..., Path]) -> None:
    make(17, anatomy=50)
    make(18, anatomy=50)
    make(19, marketing=50)
    make(20, anatomy=50, more={"recorded": False})
    corrupt = make(16, anatomy=50)
    linked = make_suite(corrupt.parent / "elsewhere", "latest", {"anatomy": answers(50)}, started=night(20))
    (corrupt.parent / "latest").symlink_to(linked)
    make(22, anatomy=50)
    (corrupt / FILE_NAME).write_text("{")
    suite = make(21, anatomy=50)
    assert written(suite)[1]["previous"] == "nightly-18"
    assert written(suite, previous=suite.parent / "nightly-17")[1]["previous"] == "nightly-17"
    page, found = written(suite.parent / "nightly-17")
    assert found["previous"] is None
    assert "no earlier suite to compare with" in page.text


def test_another_deployment_of_the_model_has_runs_in_common(make: Callable[..., Path]) -> None:
    make(20, anatomy=50)
    suite = make(21)
    write_run(suite, "anatomy", answers(48), deployment="other/tiny")
    _, found = written(suite)
    assert found["previous"] == "nightly-20"
    assert found["runs"][0]["previous"] == 0.5


def test_the_trend_holds_the_last_30_and_marks_regressions(make: Callable[..., Path], tmp_path: Path) -> None:
    days = range(1, 31)
    suites = [make(day, anatomy=20 if day == 10 else 50, seconds=150.0 if day == 20 else 100.0) for day in days]
    oldest = make_suite(tmp_path / "runs", "oldest", {"anatomy": answers(50)}, started="2026-10-01T01:00:00+00:00")
    assert written(suites[9])[1]["regressions"] == [run_name("anatomy")]
    page, found = written(suites[-1])
    assert [suite["name"] for suite in found["trend"]] == [suite.name for suite in suites]
    assert oldest.name not in page.text
    (row,) = found["runs"]
    assert row["trend"] == [0.2 if day == 10 else 0.5 for day in days]
    points = found["models"][0]["trend"]
    assert [day for day, point in zip(days, points, strict=True) if point["is_regression"]] == [20]
    assert page.text.count("▼") == 3  # the legend, the score of the 10th, the speed of the 20th
    assert "The last 30 suites" in page.text


def test_points_of_other_hardware_or_fewer_runs_are_hollow(make: Callable[..., Path]) -> None:
    make(19, anatomy=50, virology=50, seconds=10.0, more={"hardware": replace(HARDWARE, device="T4")})
    make(20, anatomy=50)
    page, found = written(make(21, anatomy=50, virology=50))
    assert [point["is_comparable"] for point in found["models"][0]["trend"]] == [False, True, True]
    assert not any(point["is_regression"] for point in found["models"][0]["trend"])
    assert len(page.all("path", "hollow")) == 2


# References


def test_a_suite_of_the_reference(make: Callable[..., Path], tmp_path: Path) -> None:
    suite = make(21, anatomy=50, virology=40)
    write_run(tmp_path / "stock", "anatomy", answers(52), deployment="huggingface/tiny")
    page, found = written(suite, reference=tmp_path / "stock")
    assert found["reference"] == "stock"
    assert [run["reference"] for run in found["runs"]] == [0.52, None]
    assert found["runs"][0]["reference_difference"] == pytest.approx(-0.02)
    assert "0.520" in page.text
    assert f"{MINUS}0.020" in page.text


def fidelity(run: str, **policy: Any) -> dict[str, Any]:
    return {
        "run": run,
        "verdict": "drift",
        "policy": policy,
        "logprobs": {"largest_difference": 0.25, "mean_difference": 0.01, "tolerance": 0.02},
        "tokens": {"agreeing": 30, "compared": 32},
        "score": {"metric": "exact_match", "split": "test", "ours": 0.5, "reference": 0.625},
    }


def test_what_verify_found_is_the_drift(make: Callable[..., Path], tmp_path: Path) -> None:
    policy = {"compress-weight": True, "compress-cache": 8}
    suite = make(21, more={"models": (replace(MODEL, policy=policy),)}, anatomy=50, virology=40)
    page, found = written(suite)
    assert found["drift"] == []
    assert f"{DEPLOYMENT}: weights in 4 bits, cache in 8 bits. How far that moves results is not known" in page.text
    (tmp_path / "fidelity.json").write_text(json.dumps(fidelity(run_name("anatomy", "other/tiny"), **policy)))
    page, found = written(suite, reference=tmp_path / "fidelity.json")
    (drift,) = found["drift"]
    assert (drift["compression"], drift["verdict"]) == ("weights in 4 bits, cache in 8 bits", "drift")
    assert [run["reference"] for run in found["runs"]] == [0.625, None]
    assert found["runs"][0]["reference_difference"] == -0.125  # of the sample, not of the run
    assert "2.5e-01" in page.text
    assert "30 of 32" in page.text
    assert "is not known" not in page.text
    shutil.copy(tmp_path / "fidelity.json", suite / run_name("virology") / "fidelity.json")
    assert [each["largest_difference"] for each in written(suite)[1]["drift"]] == [0.25]
    (suite / run_name("virology") / "fidelity.json").write_text("{")
    assert written(suite)[1]["drift"] == []


def test_a_suite_of_verify_is_a_reference(make: Callable[..., Path], tmp_path: Path) -> None:
    """Its own scores are ours, of a sample; the reference's are in what it found."""
    suite = make(21, anatomy=50, virology=40)
    name = write_run(tmp_path / "verify", "anatomy", answers(3, of=4))
    (tmp_path / "verify" / name / "fidelity.json").write_text(json.dumps(fidelity(name)))
    _, found = written(suite, reference=tmp_path / "verify")
    assert [run["reference"] for run in found["runs"]] == [0.625, None]
    assert [each["run"] for each in found["drift"]] == [name]


# What is not there


def test_a_sweep_that_has_not_finished(make: Callable[..., Path]) -> None:
    unstarted = RunRecord(
        name=run_name("virology"), deployment=DEPLOYMENT, status="done", requests=0, cached=0, failed_requests=3,
        new_tokens=0, seconds=0.0,
    )  # fmt: skip
    suite = make(21, more={"finished": None, "models": (), "runs": (unstarted,)}, anatomy=50)
    page, found = written(suite)
    assert found["status"] == "unfinished"
    assert [run["status"] for run in found["runs"]] == ["done", "failed"]
    assert "This sweep has not finished" in page.text
    assert "mmlu virology failed: its directory is not there" in page.text
    assert "has 3 failed requests" in page.text


def test_a_sweep_of_which_nothing_is_there_yet(tmp_path: Path) -> None:
    write_record(
        tmp_path / "suite",
        SweepRecord(suite="suite", started=night(21), finished=None, versions={}, commit=None, hardware=HARDWARE),
    )
    page, found = written(tmp_path / "suite")
    assert found["runs"] == []
    assert "No run has a score yet." in page.text


def test_a_suite_of_plain_helm(make: Callable[..., Path]) -> None:
    make(1, anatomy=50)
    suite = make(21, more={"recorded": False}, anatomy=20)
    (suite / "groups").mkdir()
    (suite / run_name("virology")).mkdir()
    os.utime(suite / run_name("anatomy") / "run_spec.json", (1_795_000_000, 1_795_000_000))
    page, found = written(suite)
    assert (found["status"], found["models"], found["hardware"]) == ("unrecorded", [], None)
    assert [run["status"] for run in found["runs"]] == ["done", "unfinished"]
    assert found["started"] == "2026-11-18T11:06:40+00:00"
    assert found["previous"] == "nightly-1"
    assert "no record of a sweep" in page.text
    assert "it has not ended, or failed: there is no stats.json" in page.text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "there is no suite nowhere"),
        (["empty"], "holds no runs of HELM"),
        (["nightly-21", "--previous", "nowhere"], "there is no suite nowhere"),
        (["nightly-21", "--reference", "nowhere"], "there is no suite nowhere"),
        (
            ["nightly-21", "--reference", "nightly-21/flexgen_sweep.json"],
            "neither a suite's directory nor a fidelity.json",
        ),
        (["nightly-21", "--reference", "empty"], "holds no runs of HELM"),
        (["corrupt"], "flexgen_sweep.json has version 9"),
        ([], "required: SUITE"),
    ],
)
def test_bad_input_leaves_nothing(
    make: Callable[..., Path], tmp_path: Path, arguments: list[str], line: str, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    make(21, anatomy=50)
    runs = tmp_path / "runs"
    (runs / "empty").mkdir()
    (runs / "corrupt").mkdir()
    (runs / "corrupt" / FILE_NAME).write_text('{"version": 9}')
    monkeypatch.chdir(runs)
    assert main(["report", *arguments, "-o", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert line in told
    assert told.count("\n") == 1
    assert list(tmp_path.rglob("*report*")) == []


def test_the_command(make: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    suite = make(21, anatomy=50)
    assert main(["report", "nightly-21", "-o", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{suite / 'report.html'}\n"
    assert {each.name for each in suite.iterdir() if each.is_file()} == {FILE_NAME, "report.html", "report.json"}


@pytest.mark.parametrize("failing", [1, 2])
def test_a_full_disk_leaves_whole_files(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The data are written first, then the page."""
    suite = make(21, anatomy=50)
    written(suite)
    page, data = ((suite / name).read_bytes() for name in ("report.html", "report.json"))
    make(20, anatomy=50)  # so that the report is another one
    calls = []

    def no_space(handle: int) -> None:
        calls.append(handle)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(ConfigError, match=r"cannot be written .*: No space left"):
        write_report(suite)
    assert (suite / "report.html").read_bytes() == page
    assert ((suite / "report.json").read_bytes() == data) == (failing == 1)
    assert json.loads((suite / "report.json").read_bytes())["suite"] == "nightly-21"
    assert {each.name for each in suite.glob("*report*")} == {"report.html", "report.json"}


# Names from users

HOSTILE = "<script>alert('1')</script>\"&amp;<!--"


def test_hostile_names_are_shown_and_not_run(make: Callable[..., Path], tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "_")
    make_suite(tmp_path / "runs", f"before {name}", {name: answers(50)}, started=night(20))
    suite = make_suite(
        tmp_path / "runs",
        f"suite {name}",
        {name: answers(20), f"other {name}": answers(50)},
        started=night(21),
        failed={f"failed {name}": f"Error: {HOSTILE} \x00 \ud800"},
        models=(replace(MODEL, policy={HOSTILE: HOSTILE}, plan={HOSTILE: [HOSTILE]}),),
        versions={HOSTILE: HOSTILE},
        commit=HOSTILE,
        hardware=replace(HARDWARE, device=HOSTILE, host=HOSTILE),
    )
    (suite / run_name(name) / "fidelity.json").write_text(json.dumps({**fidelity(run_name(name)), "verdict": HOSTILE}))
    page, _ = written(suite)
    assert page.text.count(HOSTILE) >= 8
    assert page.text.count(name) >= 6
    shown = (suite / "report.html").read_text(encoding="utf-8")
    assert "<script" not in shown
    assert "<!--" not in shown
    assert "\x00" not in shown


def elements(texts: Callable[[], str], runs: Path) -> tuple[list[tuple[str, frozenset[str]]], str]:
    """Elements of the page of a suite all of whose texts are drawn, with their attributes' names; and the page."""
    name = f"a{texts()}".replace("/", "_")
    subjects, failed = {name: answers(20), f"b {name}": answers(50)}, {f"c {name}": texts()}
    suite = make_suite(
        runs,
        "suite",
        subjects,
        started=night(21),
        failed=failed,
        models=(replace(MODEL, policy={texts(): texts()}, plan={texts(): [texts()]}),),
        versions={"torch": texts()},
        commit=texts(),
        hardware=replace(HARDWARE, device=texts(), host=texts()),
    )
    (suite / run_name(name) / "fidelity.json").write_text(json.dumps({**fidelity(run_name(name)), "verdict": texts()}))
    page, _ = written(suite)
    page.assert_self_contained()
    # Where a long name may be broken goes by its signs.
    return [(tag, frozenset(attrs)) for tag, attrs in page.tags if tag != "wbr"], (suite / "report.html").read_text()


PIECES = [
    "<",
    ">",
    "&",
    '"',
    "'",
    "`",
    "=",
    "</td>",
    "<!--",
    "-->",
    "<script>",
    "]]>",
    "&lt;",
    "&#60;",
    "onload=",
    "\x1b",
]


@settings(max_examples=4, deadline=None)
@given(st.data())
def test_no_text_makes_an_element_or_an_attribute(data: st.DataObject) -> None:
    """The page of a suite with any text has the elements of one with plain text."""
    hostile = st.lists(st.sampled_from(PIECES) | st.text(min_size=1, max_size=3), min_size=1, max_size=4).map("".join)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        plain, _ = elements(lambda: "plain", Path(one))
        found, page = elements(lambda: f"{data.draw(hostile).replace(chr(0), '')}x", Path(other))
    assert found == plain
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", page)


def test_the_page_is_one_that_any_browser_lays_out(make: Callable[..., Path]) -> None:
    make(20, anatomy=50)
    suite = make(21, anatomy=40)
    page, _ = written(suite)
    shown = (suite / "report.html").read_text(encoding="utf-8")
    assert shown.startswith('<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">')
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert all(attrs.get("aria-label") for attrs in page.all("svg"))
    for rule in ("prefers-color-scheme: dark", "@media print", "@media (max-width: 640px)"):
        assert rule in page.style
    used = set(re.findall(r"var\((--[a-z-]+)\)", page.style))
    assert used <= set(re.findall(r"(--[a-z-]+):", page.style))
    assert page.style.count("{") == page.style.count("}")


@pytest.mark.parametrize(
    ("runs", "names", "shared"),
    [
        (["mmlu:subject=a,k=5,model=m", "mmlu:subject=b,k=5,model=m"], ["mmlu a", "mmlu b"], ["k=5"]),
        (["mmlu:subject=a,model=m", "mmlu:subject=a,k=5,model=m"], ["mmlu", "mmlu:k=5"], ["subject=a"]),
        (["mmlu:subject=a,k=5,model=m", "boolq:model=m"], ["mmlu:subject=a,k=5", "boolq"], []),
        (
            ["mmlu:subject=a,x=1,model=m", "mmlu:subject=b,x=2,model=m"],
            ["mmlu:subject=a,x=1", "mmlu:subject=b,x=2"],
            [],
        ),
        (["mmlu:subject=a,model=m", "mmlu:subject=a,model=n"], ["mmlu:subject=a", "mmlu:subject=a"], []),
        (["wikitext_103:model=m"], ["wikitext_103"], []),
        ([], [], []),
    ],
)
def test_runs_are_named_by_what_tells_them_apart(runs: list[str], names: list[str], shared: list[str]) -> None:
    assert distinct_names(runs) == (dict(zip(runs, names, strict=True)), shared)
