"""Protects: weights that cannot be read any more, as on a network drive that fails, end in one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from engine.checkpoint.opened_weights import OpenedWeights
from engine.errors import CheckpointError
from engine.weights import read_ahead
from engine.weights.read_ahead import FileSpan, Step, run_steps
from engine.workers.process import _described

SIZE = 1 << 16


def mapped(file: Path) -> torch.Tensor:
    file.write_bytes(bytes(SIZE))
    return torch.from_file(str(file), shared=False, size=SIZE, dtype=torch.uint8)


def no_work(span: FileSpan) -> None:
    pass


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux, and its MADV_POPULATE_READ")
def test_a_mapped_file_that_was_cut_short_is_told(tmp_path: Path) -> None:
    """Whoever touched its pages would be killed by a signal; weights that are kept are made again instead."""
    file = tmp_path / "model.safetensors"
    tensor = mapped(file)
    os.truncate(file, 4096)
    done: list[str] = []
    step = Step(lambda: done.append("act"), [tensor], (FileSpan(file, 0, SIZE),))
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read any more: it is shorter than it was"):
        list(run_steps([step], no_work))
    kept = Step(lambda: done.append("act"), [tensor], sums=[1], reject=lambda: done.append("reject"))
    list(run_steps([kept], no_work))
    assert done == ["reject"]


def stale(*_: object) -> bytes:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_a_network_drive_that_went_away_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    tensor = mapped(file)
    monkeypatch.setattr(read_ahead, "_touch", stale)
    monkeypatch.setattr(read_ahead.os, "pread", stale)
    with pytest.raises(CheckpointError) as told:
        list(run_steps([Step(lambda: None, [tensor], (FileSpan(file, 0, SIZE),))], no_work))
    assert str(told.value) == (
        f"{file} cannot be read any more: Stale file handle; start again when it can, and copy the model to a disk of "
        "this machine if it is on a network drive that fails"
    )


def test_files_whose_state_cannot_be_looked_at_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"x")
    source = OpenedWeights(tmp_path)
    monkeypatch.setattr("engine.checkpoint.opened_weights.os.fstat", stale)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read any more: Stale file handle"):
        source.check()
    monkeypatch.undo()
    source.close()


def test_a_process_that_such_a_file_ended_says_so() -> None:
    assert "a network drive that went away" in _described(-7)
    assert _described(-11) == "killed by signal 11 (SIGSEGV)"
