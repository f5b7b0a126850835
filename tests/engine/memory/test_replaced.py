"""Protects: a file that is replaced has its old content or its new one, and a killed writer leaves nothing for good."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from engine.memory.replaced import partial_of, replace_text


def in_a_child(path: Path, text: str) -> int:
    """Id of a process that replaces the file."""
    child = os.fork()
    if child == 0:
        try:
            replace_text(path, text)
        finally:
            os._exit(0)
    return child


def test_what_a_killed_writer_left_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    replace_text(path, "before")
    path.chmod(0o640)
    monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    _, status = os.waitpid(in_a_child(path, "a long text of a process that was killed"), 0)
    monkeypatch.undo()
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert path.read_text() == "before"
    replace_text(path, "after")
    assert path.read_text() == "after"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_write_one_file_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    texts = [f"{number} " * 100_000 for number in range(8)]
    for child in [in_a_child(path, text) for text in texts]:
        os.waitpid(child, 0)
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    replace_text(path, "before")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_text(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_or_a_pipe_in_the_way_is_not_written_to(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "record.json", tmp_path / "elsewhere"
    (tmp_path / ".record.json.partial").symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic links"):
        replace_text(path, "after")
    (tmp_path / ".record.json.partial").unlink()
    os.mkfifo(tmp_path / ".record.json.partial")
    with pytest.raises(OSError, match="no regular file"):
        replace_text(path, "after")
    assert not elsewhere.exists()
    assert not path.exists()


def test_what_is_ones_own_stays_so_where_an_unfinished_copy_was_left_for_all(tmp_path: Path) -> None:
    partial_of(tmp_path / "digests").touch()
    partial_of(tmp_path / "digests").chmod(0o666)
    replace_text(tmp_path / "digests", "{}", mode=0o600)
    assert (tmp_path / "digests").stat().st_mode & 0o777 == 0o600
