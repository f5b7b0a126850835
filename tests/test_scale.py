"""Protects: what is said of scale follows from its inputs by hand; a driver of made hosts keeps each answer once."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from benchmarks.made_hosts import Setting
from benchmarks.scale import Beside, Measured, Requests, measured, one_after_the_other, record, side_by_side
from benchmarks.scale_driver import simulate

ASKED = Requests(number=36_000, new_tokens=360_000, runs=1)
RATES = {
    "small": Measured(weight_bytes=1e9, start_s=10.0, requests_s=100.0, new_tokens_s=1000.0),  # 360 + 360 s
    "large": Measured(weight_bytes=5e9, start_s=50.0, requests_s=10.0, new_tokens_s=100.0),  # 3600 + 3600 s
}
DRIVER = Beside(start_s=20.0, share=0.9, made_s=1000.0, kept_s=3600.0, bytes_an_answer=1.0)  # HELM: 36 s, cache: 10 s
MODELS = {"small": 2, "large": 1}


def test_models_that_take_turns_load_on_every_host() -> None:
    taken = one_after_the_other(MODELS, 16, ASKED, RATES, DRIVER)
    small, large = 720 / (16 * 0.9), 7200 / (16 * 0.9)
    assert taken.hours == pytest.approx((2 * (20 + 10 + small) + 20 + 50 + large) / 3600)
    assert (taken.bound, taken.read_bytes) == ("GPUs", 2 * (2 * 1e9 + 5e9))  # two hosts


def test_more_gpus_than_helm_has_requests_for_are_bound_by_it() -> None:
    taken = one_after_the_other({"small": 1}, 1000, ASKED, RATES, DRIVER)
    assert (taken.hours, taken.bound) == (pytest.approx((20 + 10 + 36) / 3600), "HELM")


def test_models_side_by_side_have_gpus_by_their_work() -> None:
    """8,640 s of work on 12 GPUs: two for both small models, ten for the large one."""
    taken = side_by_side(MODELS, 12, ASKED, RATES, DRIVER)
    assert taken.hours == pytest.approx(max(20 + 10 + 720, 20 + 50 + 7200 / (10 * 0.9)) / 3600)
    alone = side_by_side(MODELS, 3, ASKED, RATES, DRIVER)  # half a GPU for the small ones, which take turns on it
    assert alone.hours == pytest.approx(max(4 * (20 + 10 + 720), 20 + 50 + 7200 / (2 * 0.9)) / 3600)


def test_rates_are_those_of_the_records() -> None:
    (row,) = [each for each in record("bench-opt-30b-16GB")["rows"] if each["row"] == "10x100x400+100:1"]
    assert measured()["30B"].requests_s == pytest.approx(1000 / row["seconds"])


def test_a_driver_of_hosts_that_are_lost_keeps_each_answer_once(tmp_path: Path) -> None:
    setting = Setting(hosts=4, requests=600, sweep=20, shared=10, own=4, loss=0.2)
    found = simulate(setting, tmp_path / "cache.sqlite")
    connection = sqlite3.connect(tmp_path / "cache.sqlite")
    ((kept, different),) = connection.execute("SELECT COUNT(*), COUNT(DISTINCT key) FROM unnamed").fetchall()
    connection.close()
    assert kept == different == 600 - found["failed"]
    assert sum(found["losses"].values()) > 0
    assert found["sweeps"] >= 600 / 20
