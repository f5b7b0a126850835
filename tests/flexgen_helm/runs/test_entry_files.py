"""Protects: run entries are HELM's with what they include; nothing is read that is no regular file or has no end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from helm.benchmark.presentation.run_entry import read_run_entries

from engine.errors import ConfigError
from flexgen_helm.runs.entry_files import read_entry_file

pytestmark = pytest.mark.usefixtures("in_time")

ENTRY = 'entries: [{description: "mmlu:subject=anatomy", priority: 2}]\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # includes are looked for where the command runs, as HELM does
    return tmp_path


def list_of(folder: Path, text: str) -> Path:
    file = folder / "mine.conf"
    file.write_text(text)
    return file


@pytest.mark.parametrize("text", ['include "other.conf"\n', 'include file("other.conf")\n', 'include "oth*.conf"\n'])
def test_what_is_included_is_read_as_helm_reads_it(text: str, folder: Path) -> None:
    (folder / "other.conf").write_text(ENTRY)
    file = list_of(folder, text)
    expected = read_run_entries([str(file)]).entries
    assert expected[0].description == "mmlu:subject=anatomy"
    assert read_entry_file(file) == expected


def test_a_list_of_helms_repository_is_read_as_helm_reads_it(folder: Path) -> None:
    """They end lines with commas or without, the last one too, and leave the model to --models-to-run."""
    named = (("xstest:model=text", 1), ("bbq:subject=all,max_train_instances=0,model=text", 2))
    lines = [f'{{description: "{description}", priority: {priority}}}' for description, priority in named]
    for between in (",\n", "\n"):
        file = list_of(folder, "\n".join(["# HELM Safety", "", "entries: [", *(line + between for line in lines), "]"]))
        assert read_entry_file(file) == read_run_entries([str(file)]).entries
        assert [(each.description, each.priority) for each in read_entry_file(file)] == list(named)


def test_a_file_that_may_be_missing_may_be_missing(folder: Path) -> None:
    assert len(read_entry_file(list_of(folder, 'include "none.conf"\n' + ENTRY))) == 1


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "other.conf")


def long(folder: Path) -> None:
    with (folder / "other.conf").open("wb") as stream:
        stream.truncate(300_000_000)


def twice(folder: Path) -> None:
    """Each includes the next one twice: 2^40 files, of a few bytes each."""
    for number in range(40):
        name = "other.conf" if number == 0 else f"{number}.conf"
        (folder / name).write_text(f'a {{ include "{number + 1}.conf" }}\nb {{ include "{number + 1}.conf" }}\n')
    (folder / "40.conf").write_text("c = 1\n")


def itself(folder: Path) -> None:
    (folder / "other.conf").write_text('include "other.conf"\n')


def binary(folder: Path) -> None:
    (folder / "other.conf").write_bytes(b"\xff\xfe")


FAULTS = {
    pipe: "other.conf is a pipe",
    long: "other.conf has more than 262,144 bytes",
    twice: "all that they include have more than 262,144 bytes|recursion",
    itself: "RecursionError|more than 262,144 bytes",
    binary: r"other.conf is not UTF-8 \(byte 0\)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_included_is_told_in_a_line(fault: Any, folder: Path) -> None:
    fault(folder)
    with pytest.raises(ConfigError, match=FAULTS[fault]) as caught:
        read_entry_file(list_of(folder, 'include "other.conf"\n' + ENTRY))
    assert "\n" not in str(caught.value)


def test_nothing_is_fetched(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"include http://127\.0\.0\.1:9/x; only files are read"):
        read_entry_file(list_of(folder, 'include "http://127.0.0.1:9/x"\n' + ENTRY))
