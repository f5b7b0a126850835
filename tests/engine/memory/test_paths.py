"""Protects: what this project keeps for itself is its owner's alone, whatever the umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.checkpoint.identity.kept_digests import KeptDigests
from engine.kernels.host import library
from engine.memory.disk.file import DiskFile
from engine.memory.paths import cache_directory, make_private, open_private
from engine.weights.encoded.unit_file import write_unit


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache directory, not made yet, under a umask that takes nothing away."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = os.umask(0)
    yield cache_directory()
    os.umask(before)


def test_directories_of_the_cache_are_their_owners(cache: Path, tmp_path: Path) -> None:
    make_private(cache / "weights" / "x")
    assert [mode(each) for each in (cache, cache / "weights", cache / "weights" / "x")] == [0o700] * 3
    assert mode(tmp_path / "cache") == 0o777  # it is everybody's


def test_others_may_no_longer_write_to_one_that_is_there(cache: Path) -> None:
    (cache / "weights").mkdir(parents=True)
    make_private(cache / "weights")
    assert (mode(cache), mode(cache / "weights")) == (0o755, 0o755)


def test_what_a_user_has_named_stays_as_it_is(cache: Path, tmp_path: Path) -> None:
    make_private(tmp_path)
    before = mode(tmp_path)
    (tmp_path / "named").mkdir()
    make_private(tmp_path / "named")
    assert (mode(tmp_path), mode(tmp_path / "named")) == (before, 0o777)


def test_a_file_in_the_place_of_a_directory_is_told(cache: Path) -> None:
    cache.parent.write_text("")
    with pytest.raises(NotADirectoryError):
        make_private(cache / "weights")
    cache.parent.unlink()
    cache.parent.mkdir()
    cache.write_text("")
    with pytest.raises(NotADirectoryError):
        make_private(cache / "weights")


def test_files_are_their_owners(cache: Path, tmp_path: Path) -> None:
    make_private(cache / "weights")
    write_unit(
        cache / "weights" / "x.safetensors", "x", 4, lambda first, end: torch.zeros(end - first, dtype=torch.uint8)
    )
    assert mode(cache / "weights" / "x.safetensors") == 0o600
    with open(tmp_path / "x", "w", opener=open_private) as stream:
        stream.write("x")
    assert mode(tmp_path / "x") == 0o600


def test_so_is_the_digest_of_weights(cache: Path, tmp_path: Path) -> None:
    kept = KeptDigests(tmp_path)
    kept.write({})
    assert (mode(kept.file), mode(kept.file.parent)) == (0o600, 0o700)


def test_so_is_what_is_offloaded(cache: Path, tmp_path: Path) -> None:
    file = DiskFile.create(str(tmp_path / "offload"), 1 << 12)
    status = os.fstat(file._handle)
    file.close()
    assert (mode(tmp_path / "offload"), stat.S_IMODE(status.st_mode)) == (0o700, 0o600)


def test_code_is_not_taken_from_where_others_may_write(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of another user's, which this one cannot take the right from."""
    (cache).mkdir(parents=True)
    monkeypatch.setattr(library, "make_private", lambda folder: None)
    with pytest.raises(PermissionError, match="is writable by others"):
        library.compiled("x", [Path(__file__)])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives directories to other users")
def test_nor_from_another_users(cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    cache.chmod(0o755)
    os.chown(cache, 12345, -1)
    with pytest.raises(PermissionError, match="is writable by others"):
        library.compiled("x", [Path(__file__)])
