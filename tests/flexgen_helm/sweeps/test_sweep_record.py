"""Protects: a sweep's record comes back as it was written, is never half there, and all else is refused by name."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from flexgen_helm.planning.environment import Hardware
from flexgen_helm.sweeps.record import (
    FILE_NAME,
    ModelRecord,
    RunRecord,
    SweepRecord,
    TimelinePoint,
    TimeSplit,
    read_record,
    thinned,
    write_record,
)

MODEL = ModelRecord(
    deployment="flexgen/opt-30b",
    policy={"percent": [20, 80, 0, 100, 0, 100], "compress-weight": False},
    plan={"sequences": 144},
    seconds=100.5,
    limit_s=None,
    fraction=None,
    requests=12,
    cached=2,
    computed=10,
    prompt_tokens=4000,
    prefix_tokens_saved=3000,
    new_tokens=50,
    sweeps=6,
    time_split=TimeSplit(load=10, prefill=60, decode=20, host=10.5),
    timeline=(TimelinePoint(at=0.0, seconds=1.5, prefill_rows=400, decode_rows=0, sequences=10),),
)
RUN = RunRecord(
    name="mmlu:subject=anatomy,model=facebook_opt-30b",
    deployment="flexgen/opt-30b",
    status="failed",
    error="MetricError: “no network”",
    requests=12,
    cached=2,
    failed_requests=1,
    new_tokens=50,
    seconds=99,
)
RECORD = SweepRecord(
    suite="nightly",
    started="2026-11-22T01:00:00+00:00",
    finished=None,
    versions={"flexgen-helm": "0.1.0", "python": "3.11.7"},
    commit=None,
    hardware=Hardware(device="cpu", device_memory_bytes=None, host="box", cores=2, host_memory_bytes=2**34),
    models=(MODEL,),
    runs=(RUN,),
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write_record(tmp_path / "runs" / "nightly", RECORD)
    assert path.name == FILE_NAME
    assert read_record(path.parent) == RECORD
    assert [each.name for each in path.parent.iterdir()] == [FILE_NAME]
    write_record(path.parent, replace(RECORD, finished="2026-11-22T02:00:00+00:00"))
    assert read_record(path.parent) == replace(RECORD, finished="2026-11-22T02:00:00+00:00")


def test_who_reads_while_it_is_written_reads_it_whole(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)
    with (tmp_path / FILE_NAME).open() as reader:
        beginning = reader.read(20)
        write_record(tmp_path, replace(RECORD, suite="another one"))
        assert json.loads(beginning + reader.read())["suite"] == RECORD.suite


def test_no_record_is_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(tmp_path, RECORD)

    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_record(tmp_path, replace(RECORD, suite="other"))
    assert read_record(tmp_path) == RECORD
    assert [each.name for each in tmp_path.iterdir()] == [FILE_NAME]


def changed(**changes: Any) -> Any:
    """The record as JSON, each `path__to__field` of `changes` set to something else."""
    written = json.loads(json.dumps(asdict(RECORD)))
    for name, value in changes.items():
        *way, last = [int(part) if part.isdigit() else part for part in name.split("__")]
        place = written
        for part in way:
            place = place[part]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return written


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"version": 2}, "has version 2, this flexgen-helm reads 1"),
        ({"version": ...}, "has version None"),
        ({"suite": 3}, "suite is '3' where a text is expected"),
        ({"started": "yesterday"}, "yesterday"),
        ({"started": "2026-11-22T01:00:00"}, "has no time zone"),
        ({"hardware__cores": True}, "hardware.cores is 'True' where a whole number is expected"),
        ({"hardware__cores": ...}, "hardware.cores is missing"),
        ({"models__0__seconds": "1"}, r"models\[0\].seconds is '1' where a number is expected"),
        ({"models__0__seconds": float("nan")}, r"models\[0\].seconds is nan"),
        ({"models__0__seconds": 10**400}, "too large"),
        ({"models__0__seconds": None}, r"models\[0\].seconds is 'None'"),
        ({"models__0__new": 1}, r"models\[0\].new is unknown"),
        ({"models__0__timeline": {}}, r"models\[0\].timeline is '{}' where a list is expected"),
        ({"models__0__timeline__0__at": []}, r"models\[0\].timeline\[0\].at is '\[\]'"),
        ({"versions__torch": 2}, "versions.torch is '2' where a text is expected"),
        ({"runs__0__status": "fine"}, r"runs\[0\].status is 'fine', none of done, failed, skipped"),
        ({"runs__0": "x"}, r"runs\[0\] is 'x' where a mapping is expected"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps(changed(**changes)))
    with pytest.raises(ConfigError, match=line) as caught:
        read_record(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / FILE_NAME) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"[]"])
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ConfigError, match=FILE_NAME):
        read_record(tmp_path)


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_record(tmp_path, replace(RECORD, models=(replace(MODEL, seconds=float("inf")),)))
    assert list(tmp_path.iterdir()) == []


@given(num_points=st.integers(0, 60), most=st.integers(1, 20))
def test_a_thinned_timeline_keeps_its_sums(num_points: int, most: int) -> None:
    points = [
        TimelinePoint(at=2.0 * n, seconds=2.0, prefill_rows=n, decode_rows=3, sequences=n % 7, new_tokens=n)
        for n in range(num_points)
    ]
    few = thinned(points, most)
    assert len(few) == min(most, num_points) or (num_points > most and most / 2 <= len(few) <= most)
    assert sum(point.seconds for point in few) == 2.0 * num_points
    assert sum(point.prefill_rows for point in few) == sum(range(num_points))
    assert sum(point.new_tokens or 0 for point in few) == sum(range(num_points))
    assert max((point.sequences for point in few), default=0) == max((n % 7 for n in range(num_points)), default=0)
    assert all(one.at + one.seconds == other.at for one, other in itertools.pairwise(few))
