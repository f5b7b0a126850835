"""Protects: what a report says of answers is what HELM's files hold, counted by hand; texts are shown, never run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helm.benchmark.adaptation.adapter_spec import AdapterSpec
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.scenarios.scenario import Input, Instance
from helm.common.general import asdict_without_nones
from helm.common.request import GeneratedOutput, Request, RequestResult, Thinking, Token
from html_page import Page
from hypothesis import given
from hypothesis import strategies as st
from made_suites import DEPLOYMENT, MODEL, answers, make_suite, run_name

from flexgen_helm.commands.report import write_report
from flexgen_helm.suites import answers as reader
from flexgen_helm.suites.answers import read_answers, request_states
from flexgen_helm.sweeps.record import Lengths, RunRecord, TimelinePoint

HOSTILE = "</pre></details><script>alert('1')</script><!-- \x00 \ud800 &amp; \"request_states\": ["


def output(tokens: int, text: str = "so", reason: str | None = "stop", thinking: str | None = None) -> GeneratedOutput:
    return GeneratedOutput(
        text=text,
        logprob=-0.5,
        tokens=[Token(text="a", logprob=-0.5)] * tokens,
        finish_reason=None if reason is None else {"reason": reason},
        thinking=None if thinking is None else Thinking(text=thinking),
    )


def write_states(folder: Path, outputs: Sequence[Sequence[GeneratedOutput]], **request: Any) -> list[Any]:
    """HELM's file of a run whose requests got these completions, as HELM writes it; returns what it holds."""
    spec = AdapterSpec(instructions=HOSTILE, max_tokens=100, model="m", model_deployment=DEPLOYMENT)
    states = [
        RequestState(
            instance=Instance(Input(text=f"question {n} {HOSTILE}"), references=[], split="test", id=f"id{n}"),
            reference_index=None,
            request_mode=None,
            train_trial_index=0,
            output_mapping=None,
            request=Request(model="m", model_deployment=DEPLOYMENT, prompt="", **request),
            result=RequestResult(success=bool(each), embedding=[], completions=list(each), cached=False),
            num_train_instances=0,
            prompt_truncated=False,
        )
        for n, each in enumerate(outputs)
    ]
    told = asdict_without_nones(ScenarioState(spec, states))
    (folder / "scenario_state.json").write_text(json.dumps(told, indent=2))
    run_spec = json.loads((folder / "run_spec.json").read_text())
    run_spec["adapter_spec"]["max_tokens"] = 100
    (folder / "run_spec.json").write_text(json.dumps(run_spec))
    return list(told["request_states"])


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Its runs: anatomy thinks, virology does not, astronomy asks for a letter."""
    thinking = Lengths.of([70, 9])
    runs = tuple(
        RunRecord(
            name=run_name(subject), deployment=DEPLOYMENT, status="done", requests=1, cached=0, failed_requests=0,
            new_tokens=1, seconds=1.0, thinking=thinking if subject == "anatomy" else None,
        )
        for subject in ("anatomy", "astronomy", "virology")
    )  # fmt: skip
    timeline = tuple(
        TimelinePoint(at=2.0 * n, seconds=2.0, prefill_rows=0, decode_rows=0, sequences=1, new_tokens=10 * n)
        for n in range(3)
    )
    model = replace(MODEL, timeline=timeline)
    scores = {subject: answers(5, of=10) for subject in ("anatomy", "astronomy", "virology")}
    return make_suite(tmp_path, "suite", scores, runs=runs, models=(model,))


def by_hand(states: list[Any]) -> dict[str, Any]:
    """What the file holds, counted in the plainest way."""
    outputs = [each for state in states for each in state["result"]["completions"]]
    tokens = sorted(len(each["tokens"]) for each in outputs)
    cut = [each for each in outputs if each["finish_reason"]["reason"] == "length"]
    return {
        "texts": len(outputs),
        "tokens": sum(tokens),
        "median": next(n for n in tokens if sum(m <= n for m in tokens) >= len(tokens) * 0.5),
        "ninth_decile": next(n for n in tokens if sum(m <= n for m in tokens) >= len(tokens) * 0.9),
        "longest": tokens[-1],
        "thought": sum("thinking" in each for each in outputs),
        "cut_off": len(cut),
        "cut_off_thinking": sum("thinking" in each and each["text"] == "" for each in cut),
    }


def test_lengths_and_cut_off_answers_are_those_of_the_file(suite: Path) -> None:
    anatomy = [
        [output(3), output(40, reason="length", thinking="why")],
        [],  # a request that failed
        [output(0, "", "length", thinking="for ever"), output(0, "", "length")],
        *([output(n)] for n in range(1, 20)),
    ]
    states = {"anatomy": write_states(suite / run_name("anatomy"), anatomy)}
    states["virology"] = write_states(suite / run_name("virology"), [[output(7, HOSTILE)]])
    page = Page(write_report(suite).read_text(encoding="utf-8"))
    page.assert_self_contained()
    runs = {run["name"]: run for run in json.loads((suite / "report.json").read_text())["runs"]}
    for subject, told in states.items():
        found = runs[run_name(subject)]["answers"]
        told_by_hand = by_hand(told)
        assert {**found["lengths"], **found}.items() >= told_by_hand.items()
    lengths = runs[run_name("anatomy")]["answers"]["lengths"]
    assert lengths["bins"] == [2, 1, 3, 4, 8, 4, 1]  # 0; 1; 2 to 3; 4 to 7; 8 to 15; 16 to 31; 32 to 63
    assert runs[run_name("anatomy")]["thinking"] == {
        "texts": 2, "tokens": 79, "median": 9, "ninth_decile": 70, "longest": 70, "bins": [0, 0, 0, 0, 1, 0, 0, 1]
    }  # fmt: skip
    assert runs[run_name("astronomy")]["answers"] is None
    for words in ("3 (13%)", "1 (50%)", "2 of 0 tokens; 1 of 1 tokens; 3 of 2 to 3 tokens"):
        assert words in page.text + json.dumps(page.all("svg", "spark")), words


def test_a_few_answers_are_to_be_read(suite: Path) -> None:
    outputs = [
        [output(5, "the first", thinking=f"I think {HOSTILE}")],
        [output(2, "x" * (reader.MOST_CHARACTERS + 12))],
        [output(9, f"the longest {HOSTILE}")],
        [output(9, "as long")],
        [output(1, "cut", "length")],
        [output(1, "cut, too", "length")],
    ]
    write_states(suite / run_name("anatomy"), outputs)
    found = read_answers(suite / run_name("anatomy"))
    assert found is not None
    assert [(each.why, each.instance, each.tokens) for each in found.samples] == [
        ("first", "id0", 5),
        ("longest", "id2", 9),
        ("cut off", "id4", 1),
    ]
    shown = write_report(suite).read_text(encoding="utf-8")
    page = Page(shown)
    page.assert_self_contained()
    visible = HOSTILE.replace("\x00", "�").replace("\ud800", "�")
    assert f"I think {visible}" in page.text
    assert f"the longest {visible}" in page.text
    assert f"question 0 {visible}" in page.text
    assert "<script" not in shown
    assert [attrs for attrs in page.all("details") if "open" in attrs] == page.all("details")[:1]  # the policy
    assert "the first" in page.text
    assert "cut, too" not in page.text


@given(size=st.integers(1, 400), outputs=st.lists(st.text(max_size=30), max_size=8))
def test_states_are_read_a_piece_at_a_time(
    size: int, outputs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("states")
    (folder / "run_spec.json").write_text('{"adapter_spec": {}}')
    told = write_states(folder, [[output(1, f"{text} é")] for text in outputs])
    file = folder / "scenario_state.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "_PIECE", size)
        assert list(request_states(file)) == told
        whole = json.dumps(json.loads(file.read_text()), ensure_ascii=False).encode("utf-8", "replace")
        file.write_bytes(whole)
        assert list(request_states(file)) == json.loads(whole)["request_states"]
        file.write_bytes(whole[: whole.rindex(b"]")])
        with pytest.raises(ValueError, match="ends before its request states do"):
            list(request_states(file))


def test_reasons_that_are_not_told_and_files_that_cannot_be_read(suite: Path) -> None:
    folder = suite / run_name("anatomy")
    write_states(folder, [[output(3, reason=None)]])
    found = read_answers(folder)
    assert found is not None
    assert found.cut_off is None
    write_states(folder, [[output(3)]], echo_prompt=True)  # its tokens are the prompt's, too
    assert read_answers(folder) is None
    for content in ("", "{", '{"request_states": [{"request": {}}]}', '{"request_states": 3}'):
        (folder / "scenario_state.json").write_text(content)
        assert read_answers(folder) is None
    assert "Scores" in Page(write_report(suite).read_text(encoding="utf-8")).text


def test_new_tokens_over_time_are_those_of_the_record(suite: Path) -> None:
    write_states(suite / run_name("anatomy"), [[output(3)]])
    shown = write_report(suite).read_text(encoding="utf-8")
    chart = shown.partition("New tokens a second")[2].partition("</div></div>")[0]
    area = chart.partition('class="area decode"')[0].rpartition('d="')[2]
    tops = [float(part.partition("h")[0]) for part in area.split("V")[1:-1]]
    rates = [10 * (1 - top / 100) for top in tops]  # its scale ends at 10, as its highest rate does
    assert len(rates) == 100
    assert sum(rates) * 6 / 100 == pytest.approx(30, rel=0.01)
    assert rates[10] == 0
    assert rates[-1] == pytest.approx(10)


def test_answers_whose_tokens_a_client_does_not_tell_are_not_measured(suite: Path) -> None:
    folder = suite / run_name("virology")
    write_states(folder, [[output(3)], [output(0, "some text")]])
    assert read_answers(folder) is None
    write_states(folder, [[output(3)], [output(0, "")]])
    assert read_answers(folder) is not None
