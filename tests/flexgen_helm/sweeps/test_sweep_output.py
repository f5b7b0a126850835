"""Protects: what a sweep tells of itself (progress, logs, tally, summary) is right for known inputs."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from screens import screen

from engine.errors import ConfigError, EngineError, JobError
from engine.schedule.timing import SweepTiming
from flexgen_helm.helm.requests.asked import Answer
from flexgen_helm.helm.scores import Score
from flexgen_helm.planning.environment import Hardware
from flexgen_helm.sweeps import log as sweep_log
from flexgen_helm.sweeps import progress as sweep_progress
from flexgen_helm.sweeps import tally as sweep_tally
from flexgen_helm.sweeps.device_time import DeviceTime
from flexgen_helm.sweeps.log import JsonLog, suite_log
from flexgen_helm.sweeps.progress import Standing, SweepProgress
from flexgen_helm.sweeps.record import ModelRecord, RunRecord, SweepRecord, TimeSplit
from flexgen_helm.sweeps.summary import MOST_FAILURES, MOST_ROWS, summary
from flexgen_helm.sweeps.tally import Tally
from flexgen_helm.terminal.live import Row


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def standing() -> Standing:
    return Standing(num_runs=57, runs_ended=3, doing="flexgen/m", requests=1000, requests_done=250, tokens=8000,
                    tokens_done=2000, active={"a": (1, 4)})  # fmt: skip


def test_a_line_tells_where_the_suite_is(tmp_path: Path) -> None:
    progress = SweepProgress(standing(), JsonLog(None), lambda: (20.0, 3000.0, 0.85), tuple, io.StringIO())
    assert progress.line() == ("runs 3/57, flexgen/m, requests 250/1000, 150 tokens/s, 85% of the limit, 1:00 left")
    before = SweepProgress(Standing(57), JsonLog(None), lambda: (0.0, 0.0, None), tuple, io.StringIO())
    loading = Standing(57, doing="flexgen/m", is_loading=True)
    for seconds, told in ((0.0, "runs 0/57, loading flexgen/m"), (1.0, "runs 0/57, flexgen/m")):
        assert (
            SweepProgress(loading, JsonLog(None), lambda s=seconds: (s, 0.0, None), tuple, io.StringIO()).line() == told
        )
    assert before.line() == "runs 0/57, starting"


@pytest.mark.parametrize("kind", ["plain", "dumb", "xterm"])
def test_progress_shows_itself_and_tells_machines(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO() if kind == "plain" else Terminal()
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr(sweep_progress, "PLAIN_INTERVAL_S", 0.01)
    monkeypatch.setattr(sweep_progress, "TERMINAL_INTERVAL_S", 0.01)
    log = tmp_path / "log.jsonl"
    with (
        JsonLog(str(log)) as json_log,
        SweepProgress(standing(), json_log, lambda: (20.0, 3000.0, None), tuple, stream) as it,
    ):
        while not log.read_text():
            pass
        it.say("run 4/57 b: done")
    first = json.loads(log.read_text().splitlines()[0])
    del first["at"]
    assert first == {
        "event": "progress", "doing": "flexgen/m", "runs_ended": 3, "runs": 57, "requests_done": 250, "requests": 1000,
        "tokens_per_s": 150.0, "fraction_of_limit": None, "left_s": 60.0, "active": {"a": [1, 4]},
    }  # fmt: skip
    written = stream.getvalue()
    assert ("runs 3/57, flexgen/m" in written) == (kind != "xterm")
    assert ("run 4/57 b: done\n" in written) == stream.isatty()
    if kind == "xterm":
        (ended,) = screen(written)
        assert ended == "run 4/57 b: done"
    else:
        assert written.endswith("\n") or written.endswith("\r")  # what comes next begins a line


def test_rows_tell_where_the_suite_is() -> None:
    now = standing()
    now.suite, now.active = (
        "s",
        {f"mmlu:subject={name},model=m": (done, 9) for name, done in {"a": 4, "b": 8, "c": 0, "d": 6}.items()},
    )
    devices = (DeviceTime(device="cuda:0", sweeps=2, computing=6.0, link=3.0, helm=1.0),)
    progress = SweepProgress(now, JsonLog(None), lambda: (20.0, 3000.0, 0.85), lambda: devices, io.StringIO())
    assert progress.rows() == [
        Row("suite", "s"),
        Row("now", "flexgen/m"),
        Row("runs", "3/57", 3 / 57),
        Row("requests", "250/1000", 0.25),
        Row("speed", "150 tokens/s, 85% of the limit, 1:00 left"),
        Row("device", "cuda:0 computing 60%, link 30%, HELM 10%"),
        Row("run", "mmlu:subject=b 8/9"),
        Row("run", "mmlu:subject=d 6/9"),
        Row("run", "mmlu:subject=a 4/9"),
    ]
    begun = SweepProgress(Standing(57, "s"), JsonLog(None), lambda: (0.0, 0.0, None), tuple, io.StringIO())
    assert begun.rows() == [Row("suite", "s"), Row("now", "starting"), Row("runs", "0/57", 0.0)]


def test_logs_are_appended_and_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_log, "LOG_BYTES", 2000)
    for number in range(3):
        with suite_log(tmp_path):
            for line in range(100):
                sweep_log.logger.info("sweep %d, line %d", number, line)
            logging.getLogger("helm").warning("HELM warns of %d", number)
        with JsonLog(str(tmp_path / "log.jsonl")) as json_log:
            json_log.write("end", number=number)
    sweep_log.logger.info("after the end")
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"log.jsonl", "flexgen_sweep.log", *(f"flexgen_sweep.log.{n}" for n in range(1, 6))}
    assert max(file.stat().st_size for file in tmp_path.glob("*.log*")) <= 2000
    assert (tmp_path / "flexgen_sweep.log").read_text().splitlines()[-1].endswith("WARNING HELM warns of 2")
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event["number"] for event in events] == [0, 1, 2]


def test_a_log_without_a_place_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--json-log .*no/log cannot be written: No such file"):
        JsonLog(str(tmp_path / "no/log"))


def test_a_full_disk_ends_the_json_log_and_nothing_else() -> None:
    with JsonLog("/dev/full") as json_log:
        json_log.write("start")
        json_log.write("end")


def answer(tokens: int = 10) -> Answer:
    nothing: Any = None
    return Answer(
        work=nothing,
        outcome={},
        prompt_tokens=tokens,
        prompt_rows=tokens,
        new_tokens=1,
        most_tokens=tokens + 1,
    )


def timing(**fields: Any) -> SweepTiming:
    sweep = {"begun": 100.0, "host_s": 0.5, "sweep_s": 4.0, "load_s": 0.0, "link_s": 0.25, "device": "cpu"}
    counts = {"prefill_rows": 30, "decode_rows": 10, "num_sequences": 3, "new_tokens": 8}
    return SweepTiming(**{**sweep, **counts, **fields})


def test_a_tally_adds_sweeps_up() -> None:
    tally = Tally()
    tally.started = 97.0
    engine = SimpleNamespace(observer=None)
    tally.observe(engine, timing(load_s=1.0))  # type: ignore[arg-type]
    tally.observe(engine, timing(begun=105.0, prefill_rows=0, decode_rows=3, sweep_s=1.0))  # type: ignore[arg-type]
    for _ in range(4):
        tally.answered(answer(tokens=20))
    split = tally.split(20.0)
    assert split == TimeSplit(load=4.0, prefill=2.25, decode=0.75 + 1.0, host=20.0 - 8.0)
    assert (tally.num_sweeps, tally.prefill_rows, tally.decode_rows) == (2, 30, 13)
    assert (tally.computed, tally.prompt_tokens, tally.new_tokens, tally.saved_tokens) == (4, 80, 4, 50)
    assert [(point.at, point.seconds, point.sequences) for point in tally.timeline()] == [(3.0, 4.5, 3), (8.0, 1.5, 3)]
    (device,) = tally.devices()
    assert (device.device, device.sweeps, device.link) == ("cpu", 2, 0.5)
    assert device.computing == (0.5 + 4.0 - 1.0 - 0.25) + (0.5 + 1.0 - 0.25)
    assert tally.plan() == {}
    assert tally.limit_s() is None


def test_devices_are_told_apart_and_their_time_is_not_counted_twice() -> None:
    tally = Tally()
    tally.started = 100.0
    engine = SimpleNamespace(given_up={"cuda:1": "it fell off the bus"})
    for device in ("cuda:0", "cuda:1"):
        tally.observe(engine, timing(device=device))  # type: ignore[arg-type]
    assert tally.split(10.0) == TimeSplit(load=0.0, prefill=3.0, decode=1.0, host=6.0)
    first, second = (each.time(105.0, engine.given_up) for each in tally._devices.values())
    assert (first.computing, first.link, first.helm, first.given_up) == (4.25, 0.25, 0.5, "")
    assert str(second) == "cuda:1 computing 85%, link 5%, HELM 10%, given up (it fell off the bus)"
    assert tally.given_up() == engine.given_up


def test_a_timeline_stays_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_tally, "MOST_POINTS", 5)
    tally = Tally()
    for number in range(1000):
        tally.observe(SimpleNamespace(), timing(begun=float(number)))  # type: ignore[arg-type]
    assert len(tally._points) <= 8 * 5
    assert sum(point.prefill_rows for point in tally.timeline()) == 30 * 1000


def record(num_failed: int = 1) -> SweepRecord:
    model = ModelRecord(
        deployment="flexgen/m", policy={}, plan={}, seconds=100.0, limit_s=80.0, fraction=0.8, requests=500, cached=100,
        computed=400, prompt_tokens=9000, prefix_tokens_saved=6000, new_tokens=400, sweeps=7, time_split=TimeSplit(),
    )  # fmt: skip
    nothing: Any = {"deployment": "flexgen/m", "requests": 1, "cached": 0, "failed_requests": 0}
    nothing |= {"new_tokens": 0, "seconds": 1.0}
    runs = [
        RunRecord(name=f"bad{number}:model=m", status="failed", error=f"reason {number}", **nothing)
        for number in range(num_failed)
    ]
    hardware = Hardware(device="x", device_memory_bytes=None, host="h", cores=2, host_memory_bytes=1)
    done = RunRecord(name="good", status="done", **nothing)
    return SweepRecord(suite="s", started="2026-01-01T00:00:00+00:00", finished=None, versions={}, commit=None,
                       hardware=hardware, models=(model,), runs=(done, *runs))  # fmt: skip


def test_a_summary_says_what_was_done_and_what_failed() -> None:
    scores = [Score("good:a=1,model=m", "m", "exact_match", "test", 4, 0.25)]
    assert summary(record(), scores, ["good: 1 requests failed"], Path("out/runs/s")).splitlines() == [
        "suite s: 1 done, 1 failed, 0 skipped",
        "run       model  metric       split  instances  score",
        "good:a=1  m      exact_match  test           4  0.250",
        "failed: bad0 (flexgen/m): reason 0",
        "good: 1 requests failed",
        "flexgen/m: 500 requests (100 from the cache), 9400 tokens, 6000 of them shared, 7 sweeps in 1:40, "
        "4.0 requests/s, 80% of the limit",
        "results: out/runs/s",
    ]


def test_a_summary_stays_short_however_many_runs() -> None:
    scores = [Score(f"mmlu:subject={n},model=m", "m", "exact_match", "test", 4, n / 100) for n in range(MOST_ROWS + 1)]
    lines = summary(record(num_failed=30), scores, [], Path("out")).splitlines()
    assert len(lines) == 3 + MOST_FAILURES + 1 + 2
    assert lines[2].split() == ["mmlu,", "mean", "of", "41", "runs", "m", "exact_match", "test", "164", "0.200"]
    assert f"failed: {30 - MOST_FAILURES} more" in lines


def test_who_asks_for_a_run_that_cannot_be_run_learns_how_many_requests() -> None:
    from flexgen_helm.helm.requests.asked import raise_first

    raise_first({}, 3)
    bad: dict[int, EngineError] = {2: JobError("too long"), 1: JobError("empty")}
    with pytest.raises(JobError, match="2 of 3 requests cannot be run; number 2: empty"):
        raise_first(bad, 3)
