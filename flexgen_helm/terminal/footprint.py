"""Directories that a run makes: whether they can be written, and their removal when the run is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from engine.errors import ConfigError


class Footprint:
    """Remembers which folders were not there before, so that a refused run leaves nothing behind."""

    def __init__(self) -> None:
        self._new: list[list[Path]] = []
        """Of each folder that was watched: it and those above it that were not there, innermost first."""

    def watch(self, folders: Iterable[str | Path]) -> None:
        """Note the folders that a run is going to write; `ConfigError` for one that cannot be written."""
        for folder in folders:
            path = Path(folder).expanduser().absolute()
            missing = [parent for parent in (path, *path.parents) if not parent.exists()]
            there = missing[-1].parent if missing else path
            if not there.is_dir():
                raise ConfigError(f"cannot write {path}: {there} is not a directory")
            if not os.access(there, os.W_OK | os.X_OK):
                raise ConfigError(f"cannot write {path}: no permission in {there}")
            if missing:
                self._new.append(missing)

    def settle(self) -> None:
        """Call before the first folder is made: what is there by now is another command's, and is left alone."""
        self._new = [[path for path in folders if not path.exists()] for folders in self._new]

    def undo(self, *, keep: Path, spared: Iterable[Path] = ()) -> None:
        """Remove what was not there before.

        Left alone are `keep` (downloads), where it holds any file, and each of `spared` with the folders above it.
        """
        keep = keep.expanduser().absolute()
        others = [path.expanduser().absolute() for path in spared]
        for folders in self._new:
            mine = [path for path in folders if not any(other.is_relative_to(path) for other in others)]
            if not mine:
                continue
            path = mine[-1]
            if _holds_a_file(keep) and keep.is_relative_to(path):
                _remove_all_but(keep, path)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _holds_a_file(folder: Path) -> bool:
    return any(files for _, _, files in os.walk(folder))


def _remove_all_but(keep: Path, folder: Path) -> None:
    for child in list(folder.iterdir()):
        if child == keep:
            continue
        if keep.is_relative_to(child):
            _remove_all_but(keep, child)
        elif child.is_dir() and not child.is_symlink():
            shutil.rmtree(child, ignore_errors=True)
        else:
            child.unlink(missing_ok=True)
