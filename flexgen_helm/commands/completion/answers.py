"""Answers of `flexgen-helm complete`: JSON lines, each written as soon as it is known, so that a run can go on."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.errors import ConfigError
from engine.memory.replaced import partial_of
from flexgen_helm.terminal.errors import RunFailed

Place = tuple[int, int]
"""Index of a prompt, and which of its completions."""


@dataclass(frozen=True, kw_only=True)
class LineForm:
    """How a line identifies what it answers."""

    beginning: str
    """The beginning of every line."""
    read: Callable[[Any], tuple[Place, str | None, bool]]
    """Place, key, and whether it is a failure, of a line as JSON has it; an error of Python for what is no answer."""


def _read_own(entry: Any) -> tuple[Place, str | None, bool]:
    return (int(entry["index"]), int(entry.get("sample", 0))), entry.get("key"), "error" in entry


OWN_FORM = LineForm(beginning='{"index": ', read=_read_own)
"""Lines of our own format."""


class Answers:
    """The output of answers: a file, which is continued if it exists, or standard output.

    Another process that writes the same file is refused. A context manager; raises `RunFailed` when writing fails, and
    then all lines except the last are complete.
    """

    def __init__(self, path: Path | None, form: LineForm = OWN_FORM) -> None:
        self._path, self._form = path, form
        self._file: FileIO | None = None
        """Unbuffered: written lines survive the end of the process."""
        self._is_new = False

    def __enter__(self) -> Answers:
        if self._path is None:
            if sys.stdout is None:
                raise ConfigError("standard output is closed; name a file with --output")
            return self
        try:
            if self._path.exists() and not self._path.is_file():
                raise ConfigError(f"{self._path} is no file; leave --output out to write to standard output")
            self._path = self._path.resolve()  # what a link points to is written, not the link
            self._is_new = not self._path.exists()
            self._file = self._lock()
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be written: {error.strerror}; name another --output") from None
        return self

    @property
    def path(self) -> Path | None:
        """The file, what a link points to; None for standard output."""
        return self._path

    def _lock(self) -> FileIO:
        """The file, opened and held; `ConfigError` when another process holds it."""
        assert self._path is not None
        while True:
            file = self._path.open("ab+", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise ConfigError(
                    f"another process writes {self._path}; wait for it or name another --output"
                ) from None
            if self._path.exists() and os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                return file
            file.close()  # whoever held it has put another file in its place meanwhile

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path is not None and self._file is not None:
            self._file.close()
            if self._is_new and self._path.exists() and self._path.stat().st_size == 0:
                self._path.unlink()

    def resume(self, keys_of: Callable[[], dict[Place, str]], why: Callable[[], str]) -> set[Place]:
        """The positions that an earlier run answered; `keys_of` returns the key of the question at each, if any.

        Failures and a line that was cut off are removed, and computed again. Raises `ConfigError`, and changes nothing,
        for a file that contains anything else; `why` says what differs where it is an answer to something else.
        """
        if self._path is None:
            return set()
        *whole, cut_off = self._path.read_text(encoding="utf-8", errors="replace").split("\n")
        beginning = self._form.beginning
        if not (cut_off.startswith(beginning) or beginning.startswith(cut_off)):
            raise ConfigError(f"{self._path} is no file of answers of `complete`; name another --output")
        kept: dict[Place, str] = {}
        keys: dict[Place, str] = {}
        for number, line in enumerate(whole, 1):
            where = f"{self._path}, line {number}"
            try:
                place, key, is_failure = self._form.read(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                raise ConfigError(f"{where} is no answer of `complete`; name another --output") from None
            if is_failure:
                continue
            keys = keys or keys_of()
            if keys.get(place) != key:
                raise ConfigError(f"{where} answers something else: {why()}; name another --output or remove it")
            kept[place] = line
        self._replace(kept.values(), only_if=len(kept) < len(whole) or cut_off != "")
        return set(kept)

    def add(self, entry: dict[str, Any]) -> None:
        """Write one answer."""
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        try:
            if self._file is None:
                print(line, end="", flush=True)
            else:
                _write(self._file, line)
        except OSError as error:
            name = "standard output" if self._path is None else f"{self._path}, which keeps the answers so far,"
            raise RunFailed(f"{name} cannot be written: {error.strerror}") from None

    def sort(self) -> None:
        """Put a file's answers in the order of the prompts."""
        if self._path is None:
            return
        lines = self._path.read_text(encoding="utf-8").split("\n")[:-1]
        places = [self._form.read(json.loads(line))[0] for line in lines]
        order = sorted(range(len(lines)), key=places.__getitem__)
        self._replace([lines[at] for at in order], only_if=order != list(range(len(lines))))

    def _replace(self, lines: Iterable[str], *, only_if: bool) -> None:
        """Let the file hold `lines`, which takes effect at once or not at all."""
        if not only_if:
            return
        assert self._path is not None
        assert self._file is not None
        name = partial_of(self._path)
        try:
            # Held as the file is: what a killed process has left there is written over.
            handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RunFailed(f"{self._path.parent} takes no file next to {self._path.name}: {error.strerror}") from None
        file = open(handle, "wb", buffering=0)  # noqa: SIM115 - kept open, and held, in place of the other
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.fchmod(handle, stat.S_IMODE(os.fstat(self._file.fileno()).st_mode))
            _write(file, "".join(line + "\n" for line in lines))
            os.fsync(handle)
            os.replace(name, self._path)
        except OSError as error:
            file.close()
            os.unlink(name)
            raise RunFailed(f"{self._path} cannot be rewritten: {error.strerror}; free some space") from None
        self._file.close()
        self._file = file


def _write(file: FileIO, text: str) -> None:
    """Write all of `text`: an unbuffered file may take a part at a time."""
    left = text.encode("utf-8", errors="replace")
    while left:
        left = left[file.write(left) :]
