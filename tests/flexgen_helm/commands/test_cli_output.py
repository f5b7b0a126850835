"""Protects: progress, scores and clean-up say and do what happened, for known inputs."""

from __future__ import annotations

import io
import itertools
import subprocess
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from flexgen_helm.helm.scores import Score, choose, short_name, table
from flexgen_helm.terminal.footprint import Footprint
from flexgen_helm.terminal.progress import Progress, StatusLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def reports(progress: Progress, clock: Clock) -> None:
    """Two runs: the first with 10 of 50 answers in the cache, the second wholly in the cache."""
    progress.begin("a")
    for seconds, done, tokens in ((0, 10, 0), (5, 20, 400), (6, 30, 900), (20, 50, 2000)):
        clock.now_s = 100.0 + seconds
        progress(done, 50, tokens)
    progress.begin("b")
    clock.now_s = 130.0
    progress(7, 7, 0)


def test_progress_in_plain_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(num_runs=2, stream=stream, clock=clock)
    reports(progress, clock)
    assert progress.close() == "57 requests (17 of them from the cache), 2000 tokens in 20.0 s with loading: " + (
        "2.0 requests/s, 100 tokens/s"
    )
    assert stream.getvalue().splitlines() == [
        "run 1/2 a: requests 10/50",
        "run 1/2 a: requests 50/50, 2.0/s, 100 tokens/s",
        "run 2/2 b: requests 7/7",
    ]


def test_progress_on_a_terminal_rewrites_one_line() -> None:
    stream, clock = Terminal(), Clock()
    progress = Progress(num_runs=2, stream=stream, clock=clock)
    reports(progress, clock)
    progress.close()
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    shown = text.rstrip("\n").split("\r")[1:]
    assert [line.rstrip() for line in shown] == [
        "run 1/2 a: requests 10/50",
        "run 1/2 a: requests 20/50, 2.0/s, 80 tokens/s, 0:15 left",
        "run 1/2 a: requests 30/50, 3.3/s, 150 tokens/s, 0:06 left",
        "run 1/2 a: requests 50/50, 2.0/s, 100 tokens/s",
        "run 2/2 b: requests 7/7",
    ]
    assert all(len(line) >= len(before.rstrip()) for before, line in itertools.pairwise(shown))


def test_a_terminal_is_not_flooded() -> None:
    stream, clock = Terminal(), Clock()
    progress = Progress(stream=stream, clock=clock)
    progress.begin("a")
    for done in range(1001):
        clock.now_s += 0.001
        progress(done, 1000, done)
    assert 5 <= stream.getvalue().count("\r") <= 7


@pytest.mark.parametrize(("cached", "line"), [(5, "5 requests, all answered from the cache"), (0, "no requests")])
def test_throughput_of_nothing(cached: int, line: str) -> None:
    progress = Progress(stream=io.StringIO())
    progress.begin("a")
    if cached:
        progress(cached, cached, 0)
    assert progress.close() == line


def stat(name: str, split: str, mean: float, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"name": {"name": name, "split": split, **more}, "count": count, "sum": mean * count, "mean": mean}


STATS = [
    stat("num_instances", "test", 4.0),
    stat("num_instances", "valid", 2.0),
    stat("exact_match", "valid", 0.1),
    stat("exact_match", "test", 0.25),
    stat("exact_match", "test", 0.9, perturbation={"name": "dialect"}),
    stat("f1_score", "test", 0.5),
    stat("quasi_exact_match", "test", 0.0, count=0),
]


@pytest.mark.parametrize(
    ("metric", "split", "expected"),
    [
        ("exact_match", "valid", ("exact_match", "valid", 2, 0.1)),
        ("f1_score", "test", ("f1_score", "test", 4, 0.5)),
        (None, None, ("exact_match", "test", 4, 0.25)),
        ("unheard_of", "test", ("exact_match", "test", 4, 0.25)),
    ],
)
def test_the_main_metric_on_the_main_split(metric: str | None, split: str | None, expected: tuple[Any, ...]) -> None:
    score = choose(STATS, "r", "m", metric, split)
    assert (score.metric, score.split, score.num_instances, score.value) == expected


def test_a_run_without_a_known_metric_has_no_score() -> None:
    assert choose([stat("num_bytes", "test", 3.0)], "r", "m").value is None


def test_the_table_names_one_model_once_and_several_in_each_row() -> None:
    first = Score("mmlu:subject=anatomy,model=a_x,model_deployment=f_x", "a/x", "exact_match", "test", 12, 0.5)
    second = Score("boolq:model=a_x,model_deployment=f_x", "a/x", "f1", "test", 3, None)
    assert table([first, second]).splitlines() == [
        "a/x                   metric       split  instances  score",
        "mmlu:subject=anatomy  exact_match  test          12  0.500",
        "boolq                 f1           test           3   none",
    ]
    other = Score("boolq:model=b_y", "b/y", "f1", "test", 3, 1.0)
    assert [line.split()[0] for line in table([first, other]).splitlines()] == ["run", first.run, other.run]


@pytest.mark.parametrize(
    ("run", "short"),
    [
        (
            "mmlu:subject=a,method=b,model=x_y,eval_split=test,model_deployment=f_y",
            "mmlu:subject=a,method=b,eval_split=test",
        ),
        ("simple_mcqa:model=x_y,model_deployment=f_y", "simple_mcqa"),
        ("xstest:model=x_y,judge=a_b", "xstest:judge=a_b"),
        ("boolq", "boolq"),
    ],
)
def test_the_name_of_a_run_without_its_model(run: str, short: str) -> None:
    assert short_name(run) == short


def made(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_undo_removes_the_files_it_was_told_of_and_new_folders_that_are_empty_then(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new" / "deep"
    old.mkdir()
    footprint = Footprint()
    footprint.watch([old, new, old / "runs" / "mine"])
    assert made(tmp_path) == ["old"]
    footprint.settle()
    for file in (new / "file", old / "runs" / "mine" / "file"):
        file.parent.mkdir(parents=True)
        file.write_text("")
        footprint.wrote(file)
    footprint.undo()
    assert made(tmp_path) == ["old"]


def test_undo_leaves_every_file_of_others(tmp_path: Path) -> None:
    """Beside its own, in its own folders, and in place of its own."""
    folder = tmp_path / "new"
    footprint = Footprint()
    footprint.watch([folder / "runs" / "mine"])
    footprint.settle()
    (folder / "runs" / "mine").mkdir(parents=True)
    mine, replaced, extended = (folder / name for name in ("mine", "replaced", "extended"))
    for file in (mine, replaced, extended):
        file.write_text("mine")
        footprint.wrote(file)
    (tmp_path / "theirs").write_text("4444")
    (tmp_path / "theirs").replace(replaced)
    extended.write_text("mine and theirs")
    (folder / "notes.txt").write_text("theirs")
    footprint.undo()
    assert made(tmp_path) == ["new", "new/extended", "new/notes.txt", "new/replaced"]


def test_undo_leaves_what_was_there_when_the_first_folder_was_to_be_made(tmp_path: Path) -> None:
    mine, others = tmp_path / "new" / "runs" / "mine", tmp_path / "new" / "runs" / "other"
    footprint = Footprint()
    footprint.watch([tmp_path / "new", mine])
    others.mkdir(parents=True)
    footprint.settle()
    mine.mkdir()
    footprint.undo()
    assert made(tmp_path) == ["new", "new/runs", "new/runs/other"]


def test_undo_keeps_downloads_and_folders_that_were_there(tmp_path: Path) -> None:
    scenarios = tmp_path / "output" / "scenarios"
    (scenarios / "old").mkdir(parents=True)
    footprint = Footprint()
    footprint.watch_downloads(scenarios)
    footprint.settle()
    for name in ("mmlu", "synthetic"):
        (scenarios / name).mkdir()
    (scenarios / "mmlu" / "data.csv").write_text("")
    footprint.undo()
    assert made(scenarios) == ["mmlu", "mmlu/data.csv", "old"]


def test_a_claimed_file_goes_only_if_nobody_uses_it(tmp_path: Path) -> None:
    footprint = Footprint()
    there = tmp_path / "there"
    there.write_text("theirs")
    spent, used, opened = (tmp_path / "new" / name for name in ("spent", "used", "opened"))
    footprint.watch([tmp_path / "new"])
    for file in (there, spent, used, opened):
        footprint.claim(file)
    spent.write_text("of HELM's")
    reader = subprocess.Popen(["sleep", "60"], stdin=opened.open("rb"))
    try:
        footprint.undo(is_spent=lambda file: file != used)
    finally:
        reader.kill()
        reader.wait()
    assert made(tmp_path) == ["new", "new/opened", "new/used", "there"]


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is not a directory"):
        Footprint().watch([tmp_path / "file" / "below"])


def test_a_status_line_is_written_over_kept_or_taken_away() -> None:
    stream = Terminal()
    line = StatusLine(stream)
    line.clear()  # nothing is there yet
    line.end()
    line.show("abc")
    line.show("d")
    line.clear()
    line.show("e")
    line.end()
    line.end()
    assert stream.getvalue() == "\rabc\rd  \r \r\re\n"
    plain = io.StringIO()
    line = StatusLine(plain)
    line.show("abc")
    line.clear()
    line.end()
    assert plain.getvalue() == "abc\n"
