"""Protects: pictures show what was found, at its place, and what cannot be drawn is refused before anything is done."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from engine.policy import Share
from flexgen_helm.pictures.plan import rooms_of, times_of
from flexgen_helm.planning import policy_search
from flexgen_helm.planning.estimate import Estimate
from flexgen_helm.run import main

PLAN = ("plan", "--shape", "opt-30b", "--hardware", "t4", "--work", "1x100x400+100:1")


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Estimate]:
    """What a plan of OPT-30B finds for a T4."""
    kept: list[Estimate] = []
    search = policy_search.search

    def keep(*args: Any, **named: Any) -> list[Estimate]:
        kept.extend(search(*args, **named))
        return kept

    monkeypatch.setattr(policy_search, "search", keep)
    assert main([*PLAN]) == 0
    return kept


def test_each_percent_has_the_time_of_its_fastest_policy(found: list[Estimate]) -> None:
    slower = [replace(each, between_s=each.between_s + 1000) for each in found]
    on_host = [
        replace(each, policy=replace(each.policy, cpu_cache_compute=True), between_s=each.between_s + 5)
        for each in found[:2]
    ]
    times = times_of([*slower, *found, *on_host])
    assert list(times) == ["plain weights", "plain weights, attention on the host"]
    assert times["plain weights"] == sorted((each.plan.weights.gpu, each.seconds) for each in found)
    assert len(times["plain weights, attention on the host"]) == 2


def test_the_room_is_that_of_the_chosen_kind(found: list[Estimate]) -> None:
    best = found[0]
    policy = replace(best.policy, compress_weight=4)
    other = replace(found[-1], policy=policy, weights={**best.weights, "host": 1}, between_s=-found[-1].seconds)
    rooms = rooms_of([*found, other], best)
    assert list(rooms) == ["device", "host"]  # nothing is on disk
    for tier, (weights, held) in rooms.items():
        assert weights == sorted((each.plan.weights.gpu, each.weights[tier] / 1e9) for each in found)
        assert held == sorted((each.plan.weights.gpu, each.held[tier] / 1e9) for each in found)
    on_disk = replace(
        best, plan=replace(best.plan, weights=Share(gpu=0, cpu=50, disk=50)), held={**best.held, "disk": 1}
    )
    assert "disk" in rooms_of([on_disk], on_disk)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_plan_draws_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    file = tmp_path / f"plan{suffix}"
    assert main([*PLAN, "--plot", str(file)]) == 0
    if suffix == ".png":
        assert file.read_bytes().startswith(b"\x89PNG")
        return
    text = " ".join(ElementTree.parse(file).getroot().itertext())
    for told in ("opt-30b on Tesla T4", "weights on the GPU, %", "least time, s", "plain weights", "GPU: weights"):
        assert told in text


def refusals(tmp_path: Path) -> dict[str, str]:
    return {
        str(tmp_path / "plan.jpeg"): "name a file that ends in .png or .svg",
        str(tmp_path / "no" / "plan.svg"): "name a file in a directory that is there",
    }


def test_what_cannot_be_drawn_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing: Callable[..., Any] = lambda *args, **named: pytest.fail("it was planned")  # noqa: E731
    monkeypatch.setattr(policy_search, "search", nothing)
    for file, told in refusals(tmp_path).items():
        assert main([*PLAN, "--plot", file]) == 2
        assert told in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*PLAN, "--plot", str(tmp_path / "plan.svg")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'flexgen-helm[plot]'" in line
    assert not list(tmp_path.iterdir())


def test_the_plan_is_said_where_its_picture_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert main([*PLAN, "--plot", str(tmp_path / "plan.svg")]) == 2
    shown = capsys.readouterr()
    assert shown.out.startswith("opt-30b on Tesla T4")
    assert "cannot be written: No space left on device" in shown.err
