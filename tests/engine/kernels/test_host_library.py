"""Protects: a kept library of compiled functions is called only as it was written."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from engine.kernels.host import library, prompts

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler to compile with"
)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "twice.c"
    file.write_text("long twice(long number) { return 2 * number; }")
    return file


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "without a digest"])
def test_a_damaged_library_is_compiled_anew(source: Path, damage: str) -> None:
    """A process that calls into a mapped file that has been cut ends with SIGBUS."""
    kept = library.compiled("twice", [source])
    whole, inode = kept.read_bytes(), kept.stat().st_ino
    assert library.compiled("twice", [source]) == kept
    assert kept.stat().st_ino == inode
    if damage == "without a digest":
        kept.with_suffix(".sha256").unlink()
    else:
        kept.write_bytes({"cut": whole[: len(whole) // 3], "empty": b"", "zeros": bytes(len(whole))}[damage])
    assert library.compiled("twice", [source]) == kept
    assert ctypes.CDLL(str(kept)).twice(21) == 42


@pytest.mark.parametrize("other", [0, 1, 2, 3])
def test_numbers_of_other_dtypes_are_left_to_torch(other: int) -> None:
    parts = [torch.randn(4, 2, 16) for _ in range(5)]
    parts[other] = parts[other].bfloat16()
    query, key, value, *prefix = parts
    run = prompts.Run(borders=[0, 4], prefix=(prefix[0], prefix[1]))
    assert prompts.attend(query, key, value, [run], 0.25) is None


def test_what_is_left_of_compilations_that_were_killed_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    folder = tmp_path / "flexgen-helm"
    for name in ("compile-old", "compile-new"):
        (folder / name).mkdir(parents=True)
        (folder / name / "half.so").touch()
    long_ago = time.time() - 3600
    os.utime(folder / "compile-old", (long_ago, long_ago))
    with pytest.raises(subprocess.CalledProcessError):
        library.compiled("any", [Path(__file__)])
    assert [each.name for each in folder.iterdir()] == ["compile-new"]
