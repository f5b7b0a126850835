"""What a command makes on disk: whether it can be written, and how it is taken back when the command is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from engine.errors import ConfigError

Stamp = tuple[int, int, int]
"""Inode, time of the last change, and size: what differs as soon as another process has written a file."""


class Footprint:
    """Remembers the files that this process created, so that a refused command removes those and nothing else.

    Other processes may be working in the same folders: everything that is not known to be ours stays.
    """

    def __init__(self) -> None:
        self._absent: set[Path] = set()
        """Folders that were not there before."""
        self._downloads: dict[Path, set[Path]] = {}
        """Folders in which others make folders, and those that were in them before."""
        self._files: dict[Path, Stamp | None] = {}
        self._claimed: dict[Path, int] = {}
        """Files that were created empty, to be filled by other code, by inode."""

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
            self._absent.update(missing)

    def watch_downloads(self, folder: Path) -> None:
        """Note a folder in which folders are made for files that are worth keeping."""
        self.watch([folder])
        self._downloads[folder.expanduser().absolute()] = set()

    def settle(self) -> None:
        """Call before the first folder is made: what is there by now is another command's, and is left alone."""
        self._absent = {path for path in self._absent if not path.exists()}
        self._downloads = {folder: set(_folders_below(folder)) for folder in self._downloads}

    def wrote(self, file: Path) -> None:
        """Note a file that was not there and that this process has just written."""
        self._files[file.absolute()] = _stamp(file)

    def claim(self, file: Path) -> None:
        """Create an empty file for other code to fill; nothing is done if it exists or cannot be created."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except OSError:
            return
        self._claimed[file.absolute()] = os.fstat(handle).st_ino
        os.close(handle)

    def undo(self, *, is_spent: Callable[[Path], bool] = lambda file: True) -> None:
        """Remove the files that are still as this process left them, and the new folders that are empty then.

        A claimed file goes only if it `is_spent` and no other process has it open.
        """
        gone = [file for file, stamp in self._files.items() if stamp is not None and _stamp(file) == stamp]
        for file, inode in self._claimed.items():
            stamp = _stamp(file)
            if stamp is not None and stamp[0] == inode and is_spent(file) and not _is_open_elsewhere(file):
                gone.append(file)
        for file in gone:
            file.unlink(missing_ok=True)
        absent = set(self._absent)
        for folder, before in self._downloads.items():
            absent.update(set(_folders_below(folder)) - before)
        for folder in sorted(absent, key=lambda path: -len(path.parts)):
            with suppress(OSError):  # somebody else's files are in it, or it is gone
                folder.rmdir()


def _folders_below(folder: Path) -> list[Path]:
    return [Path(below) for below, _, _ in os.walk(folder) if Path(below) != folder]


def _stamp(file: Path) -> Stamp | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _is_open_elsewhere(file: Path) -> bool:
    """Whether another process, as far as this one may look, has the file open."""
    own, name = str(os.getpid()), os.path.realpath(file)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            handles = [] if process.name == own else list((process / "fd").iterdir())
        except OSError:  # it has ended, or is another user's
            continue
        for handle in handles:
            try:
                if os.readlink(handle) == name:
                    return True
            except OSError:
                continue
    return False
