"""Protects: what a suite is said to take before it runs is what it then takes, and `plan` leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from question_data import MMLU_SUBJECTS
from transformers import AutoModelForCausalLM

from engine.job import Job
from engine.planning import hardware
from engine.planning.hardware import Memory
from engine.planning.sharing import Resources, Sharing
from engine.policy import Policy
from flexgen_helm.commands.plan import ENTRIES_EXAMPLES, parse_plan_flags
from flexgen_helm.planning.forecast import Forecast, duration, forecast_of, lines, size
from flexgen_helm.run import main
from flexgen_helm.sweeps import foreseen
from flexgen_helm.sweeps.record import read_record

Cli = Callable[..., int]
ENTRIES = [*(f"mmlu:subject={subject}" for subject in MMLU_SUBJECTS[:2]), "simple_mcqa:max_train_instances=1"]


def test_a_sweep_takes_what_its_first_lines_say(cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine counts the same tokens and passes, and HELM's cache what is left."""
    flags = ("-r", *ENTRIES, "--model", tiny_llama, "-m", 4, "--gpu-batch-size", 100)
    before = sorted(Path().rglob("*"))
    assert cli("plan", *flags) == 0
    planned = [line.strip() for line in capsys.readouterr().out.splitlines() if "Looking in" not in line]
    assert sorted(Path().rglob("*")) == before
    assert planned[0] == f"based on all requests of {len(ENTRIES)} runs, as HELM makes them"

    assert cli("sweep", *flags, "--suite", "s", "--json-log", "log.jsonl") == 0
    told = [line.strip() for line in capsys.readouterr().err.splitlines()]
    record = read_record(Path("benchmark_output/runs/s"))
    assert record is not None
    (model,) = record.models
    events = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    (said,) = [event for event in events if event["event"] == "forecast"]
    assert (said["requests"], said["prompt"]) == (model.computed, model.prompt_tokens)
    assert said["computed"] == sum(point.prefill_rows for point in model.timeline)
    assert model.new_tokens <= said["generated"] < 20 * model.computed
    assert said["sweeps"] <= model.sweeps
    first = told.index(f"flexgen/tiny-llama: {model.computed} requests to compute, 0 answered by HELM's cache")
    assert told[first + 1] == (
        f"tokens: {said['prompt']:,} of prompts, {said['computed']:,} to compute after sharing; "
        f"at most {said['generated']:,} to generate"
    )
    assert told[first + 2].startswith("time: ")
    assert told[first + 3].startswith(
        "bytes: nothing crosses a link: the device is the host; 0 GB of weights from disk"
    )
    assert told[first + 4].startswith("room: memory ")
    assert planned[1:5] == told[first : first + 4]
    assert planned[5].startswith("room: memory ")  # how much there is, is looked at anew

    assert cli("plan", *flags) == 0
    assert f"0 requests to compute, {model.requests} answered by HELM's cache" in capsys.readouterr().out


def test_a_sweep_does_without_a_forecast_that_cannot_be_made(
    cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(foreseen, "forecast_of", fail)
    assert cli("sweep", "-r", ENTRIES[0], "--model", tiny_llama, "-m", 1, "--suite", "s") == 0
    assert "no forecast: OSError: no more processes" in capsys.readouterr().err


def test_weights_are_where_they_are_said_to_be(tiny_llama: Path, tmp_path: Path) -> None:
    """Three quarters on disk: as many bytes as the checkpoint has, and every pass reads those of layers and head."""
    weights = AutoModelForCausalLM.from_pretrained(tiny_llama)
    whole = sum(each.numel() * each.element_size() for each in weights.parameters())
    inside = sum(each.numel() * each.element_size() for each in weights.model.layers.parameters())
    policy = Policy.from_mapping({"weights": {"gpu": 25, "cpu": 0, "disk": 75}, "offload-dir": str(tmp_path)})
    jobs = [Job(prompt=[5] * 40 + [number], max_new_tokens=3) for number in range(10, 20)]
    found = forecast_of(str(tiny_llama), "float32", policy, jobs)
    assert found is not None
    assert found.weights["device"] + found.weights["disk"] == pytest.approx(whole, rel=0.02)
    assert found.weights["disk"] == pytest.approx(0.75 * whole, rel=0.02)
    assert 0.75 * inside * 0.98 <= found.disk_bytes / found.sweeps <= 0.75 * whole * 1.02
    assert (found.requests, found.sweeps) == (10, 3)
    assert (found.tokens.prompt, found.tokens.computed, found.tokens.generated) == (410, 40 + 10, 30)


@pytest.mark.parametrize("gather", [False, True])
def test_several_devices_take_what_each_brings(
    gather: bool, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three quarters on disk, of two devices: each with all of it, or half of layers and head; half of the requests."""

    def touched(*_: object) -> Memory:
        raise AssertionError("the command's own process looks for memory")

    monkeypatch.setattr(hardware, "memory_within", touched)
    policy = Policy.from_mapping({"weights": {"gpu": 25, "cpu": 0, "disk": 75}, "offload-dir": str(tmp_path)})
    jobs = [Job(prompt=[number] * 40, max_new_tokens=3) for number in range(10, 20)]
    memory = Memory(device=10**9, host=10**9, disk=10**9, shared=True)

    def found(sharing: Sharing) -> Forecast:
        resources = Resources(memory=memory, sharing=sharing)
        forecast = forecast_of(str(tiny_llama), "float32", policy, jobs, look=lambda _: resources)
        assert forecast is not None
        return forecast

    one, two = found(Sharing()), found(Sharing(count=2, gather=gather))
    assert (one.devices, two.devices) == (1, 2)
    assert (one.sweeps, two.sweeps) == (3, 3)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    split = [*model.model.layers.parameters(), *model.lm_head.parameters()]  # the head is not tied
    split_bytes = sum(each.numel() * each.element_size() for each in split)
    twice = 2 * one.weights["disk"] - (0.75 * split_bytes if gather else 0)
    assert two.weights["disk"] == pytest.approx(twice, rel=0.02)
    assert two.held["host"] - two.weights["host"] == pytest.approx(one.held["host"] - one.weights["host"], rel=0.01)


@pytest.mark.parametrize(
    ("changes", "computed"),
    [
        ({}, 40 + 3),
        ({"share_prefix": False}, 3 * 41),
        ({"pad_to_seq_len": 80}, 3 * 80),
        ({"pad_to_seq_len": "bucket"}, 3 * 64),
    ],
)
def test_tokens_to_compute_are_those_of_the_policy(changes: dict[str, Any], computed: int, tiny_llama: Path) -> None:
    jobs = [Job(prompt=[5] * 40 + [number], max_new_tokens=2) for number in range(10, 13)]
    found = forecast_of(str(tiny_llama), "float32", replace(Policy(), **changes), jobs)
    assert found is not None
    assert found.tokens.computed == computed


def test_another_machines_profile_tells_time_and_bytes(
    cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (
        "-r",
        *ENTRIES,
        "--model",
        tiny_llama,
        "-m",
        2,
        "--hardware",
        "h100-16gb",
        "--percent",
        0,
        100,
        100,
        0,
        100,
        0,
    )
    assert cli("plan", *common) == 0
    out = capsys.readouterr().out
    (time,) = [line.strip() for line in out.splitlines() if line.strip().startswith("time: ")]
    assert " at least, about " in time
    assert "loading aside; bound by " in time
    (moved,) = [line for line in out.splitlines() if "bytes: over the link " in line]
    assert "over the link 0 GB" not in moved
    assert "room: GPU " in out
    assert " of 15.2 GB" in out  # 95 % of the card
    assert "host memory " in out


def test_the_help_of_a_plan_of_entries_has_examples_that_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "nightly", "--help"])
    shown = capsys.readouterr().out
    assert "--hardware" in shown
    assert "--max-eval-instances" in shown
    for line in ENTRIES_EXAMPLES:
        assert line in shown
        assert parse_plan_flags(line.split()[2:]).model


def test_a_draft_model_s_room_is_told(tiny_llama: Path) -> None:
    """Its weights are those of the file; what it takes, the model's keys and values lack."""
    jobs = [Job(prompt=[5, 6, 7], max_new_tokens=9)]
    settings = {"device": "cpu", "dtype": "float32", "gpu-memory": "40MB", "cpu-memory": "4GB"}
    found = {}
    for name, more in (("without", {}), ("with", {"draft-model": str(tiny_llama)})):
        found[name] = forecast_of(str(tiny_llama), "float32", Policy.from_mapping({**settings, **more}), jobs)
    alone, both = found["without"], found["with"]
    assert alone is not None
    assert both is not None
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32")
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert both.draft_bytes == num_bytes
    assert both.plan.cache_budgets["device"] < alone.plan.cache_budgets["device"] - num_bytes
    assert [line for line in lines(both) if line.startswith(f"draft model: {size(num_bytes)} of weights and room for ")]
    assert not [line for line in lines(alone) if line.startswith("draft model")]


def test_numbers_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (0.5, 59, 61, 7200)] == ["0.5 s", "59 s", "1.0 min", "2.0 h"]
    assert [size(number) for number in (0, 900, 2e6, 3e9, 1.2e12)] == ["0 GB", "0.9 kB", "2.0 MB", "3.0 GB", "1.2 TB"]


BAD: dict[str, tuple[list[str], str]] = {
    "no entries": (["--hardware", "t4"], "nothing to plan: name --shape, or a file of run entries"),
    "a flag that changes nothing": (["-r", ENTRIES[0], "--dry-run"], "--dry-run changes nothing of a plan"),
    "another flag's name": (["-r", ENTRIES[0], "--allow-compression"], "--allow-compression"),
    "no such machine": (["-r", ENTRIES[0], "--hardware", "abacus"], "abacus"),
    "data that are not there": (["-r", "custom_mcqa:path=nowhere.jsonl,num_train_instances=0"], "nowhere.jsonl"),
    "no such entry": (["-r", "mmul:subject=anatomy"], "HELM has no run entry 'mmul"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, said = BAD[case]
    before = sorted(Path().rglob("*"))
    assert cli("plan", "--model", tiny_llama, *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flexgen-helm: error: ")]
    assert said in line
    assert sorted(Path().rglob("*")) == before
