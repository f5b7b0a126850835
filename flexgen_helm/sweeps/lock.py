"""Allows one sweep at a time in a suite: a lock that names its holder and ends with it, however that ends."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from types import TracebackType

from engine.errors import ConfigError
from engine.reading import read_json

FILE_NAME = "flexgen_sweep.lock"


class SuiteHeld(ConfigError):
    """Another process is running a sweep in the suite."""


class SuiteLock:
    """Locks a suite's directory, which is created if necessary, as a context manager.

    Raises `SuiteHeld` if another process has locked it, `ConfigError` if it cannot be locked. The operating system
    releases the lock when its owner ends, so the lock of a killed sweep does not remain.
    """

    def __init__(self, suite_path: Path) -> None:
        self._path = suite_path / FILE_NAME
        self._handle: int | None = None

    def __enter__(self) -> SuiteLock:
        while True:
            handle = self._locked()
            if self._is_named(handle):
                break
            os.close(handle)  # a refused sweep has removed the file meanwhile: another may have locked a new one
        self._handle = handle
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        self._write({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        return self

    def _locked(self) -> int:
        """Open and lock the file."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = self._owner()
            os.close(handle)
            raise SuiteHeld(
                f"another sweep is running in suite {self._path.parent.name}: {owner}; wait for it, or take another "
                "--suite"
            ) from None
        except OSError as error:
            os.close(handle)
            raise ConfigError(
                f"{self._path} cannot be locked: {error.strerror}; put --output-path on another file system"
            ) from None
        return handle

    def _is_named(self, handle: int) -> bool:
        """Whether the suite's lock file is still the file that is open."""
        try:
            return os.path.samestat(os.fstat(handle), self._path.stat())
        except OSError:
            return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._write(None)
            os.close(self._handle)
            self._handle = None

    def _write(self, owner: dict[str, str | int] | None) -> None:
        """Write the lock's owner. The file is never removed, because that could remove another process's lock."""
        assert self._handle is not None
        try:
            os.ftruncate(self._handle, 0)
            if owner is not None:
                os.pwrite(self._handle, json.dumps(owner).encode(), 0)
        except OSError:  # a full disk: the lock works without the text
            pass

    def _owner(self) -> str:
        try:
            owner = read_json(self._path, ConfigError, limit=10_000)
            return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
        except (ConfigError, KeyError, TypeError):
            return "a process that has not said which"
