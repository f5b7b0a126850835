"""HELM's cache of requests, in HELM's own format: writes many answers in one transaction; errors are one line."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from helm.common.cache import BlackHoleCacheConfig, CacheConfig, SqliteCacheConfig, cache_stats, create_key_value_store
from helm.common.hierarchical_logger import hwarn
from helm.common.key_value_store import KeyValueStore, request_to_key
from sqlitedict import decode, encode  # type: ignore[import-untyped]

from engine.errors import ConfigError, EngineError

Response = dict[str, Any]
_T = TypeVar("_T")

_TABLE = "CREATE TABLE IF NOT EXISTS unnamed (key TEXT PRIMARY KEY, value BLOB)"
"""The table name that sqlitedict uses."""
_BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_AT_A_TIME = 1000
"""Rows copied from a damaged file in one transaction."""
_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_TELL_AFTER_S = 3.0
"""How long to wait for a locked file before logging it."""
_SUM = b"\x00flexgen-sha256\x00"
"""Precedes a digest of key and answer after the pickle that HELM reads: a pickle marks its own end."""
_FIRST = '{"chat_template": '
"""The beginning of our keys: HELM writes the parts of a key in the order of their names."""
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
_PAGE_BYTES = 16384
"""Page size of a new file: keys are prompts, and a key of more than a quarter of a page is a chain of pages, all of
which are read to compare it with another.
"""
_CACHE_KB = 65536
"""Pages kept in memory, in kB: answers of a sweep that do not fit are written twice, with a wait in between."""


class CacheFull(EngineError):
    """Raised when there is no space for answers; what is computed would be lost, in every further run too."""


class RequestCache:
    """Answers by request, in the format of HELM's `Cache`: each reads what the other writes.

    A context manager, for one thread at a time. HELM opens its file for every request and does not wait for the disk;
    this keeps it open, and what `put` has written survives a power cut. A file that is no database, or a damaged one,
    is renamed; what can still be read of it is kept. Raises `ConfigError` on entry for a file that cannot be used,
    `EngineError` later on.
    """

    def __init__(self, config: CacheConfig, *, wait_s: float = 30.0) -> None:
        """`wait_s`: how long to wait for another process that has locked the file."""
        self._config = config
        self._wait_s = wait_s
        self.is_locked = False
        """Whether another process had locked the file for so long that this one stopped waiting."""
        self._path = Path(config.path) if isinstance(config, SqliteCacheConfig) else None
        self._connection: sqlite3.Connection | None = None
        self._store: KeyValueStore | None = None
        """HELM's own store, if the cache is no SQLite file."""

    def __enter__(self) -> RequestCache:
        if self._path is None:
            self._store = create_key_value_store(self._config)  # type: ignore[arg-type]
            self._store.__enter__()
            return self
        try:
            self._guarded(self._open)
        except EngineError as error:
            raise ConfigError(str(error)) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._store is not None:
            self._store.__exit__(None, None, None)
            self._store = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def count_query(self) -> None:
        """Count a look-up in HELM's statistics."""
        cache_stats.increment_query(self._config.cache_stats_key)

    def get(self, key: Mapping[str, Any]) -> Response | None:
        """The answer to a request, None if there is none."""
        if self._store is not None:
            return self._store.get(key) or None
        name = request_to_key(key)
        row = self._guarded(lambda: self._sql.execute("SELECT value FROM unnamed WHERE key = ?", (name,)).fetchone())
        return None if row is None else _read(name, row[0])

    def heads(self, client: str) -> list[dict[str, Any]] | None:
        """The distinct beginnings of keys of `client`, up to their "identity"; None where that cannot be determined.

        It takes as many look-ups as there are beginnings, however many keys: the file has its keys in order.
        """
        if self._store is not None:
            return [] if isinstance(self._config, BlackHoleCacheConfig) else None
        heads: list[dict[str, Any]] = []
        least = _FIRST
        while row := self._row_from(least):
            (name,) = row
            if not isinstance(name, str) or not name.startswith(_FIRST):
                break
            head = _head(name)
            if head is None or head.get("client") != client:
                least = f"{name}\0"
            else:
                heads.append(head)
                least = request_to_key(head)[:-1] + "-"  # sorts after all keys that continue with a comma
        return heads

    def _row_from(self, least: str) -> Any:
        ask = "SELECT key FROM unnamed WHERE key >= ? ORDER BY key LIMIT 1"
        return self._guarded(lambda: self._sql.execute(ask, (least,)).fetchone())

    def put(self, answers: Iterable[tuple[dict[str, Any], Response]], *, are_new: bool = True) -> None:
        """Store answers, all of them or none; they are on disk when this returns.

        are_new: they have been computed, rather than found under another key.
        """
        answers = list(answers)
        for _ in answers if are_new else ():
            cache_stats.increment_compute(self._config.cache_stats_key)
        if self._store is not None:
            self._store.multi_put(answers)
        elif answers:
            rows = sorted(_row(request_to_key(key), answer) for key, answer in answers)  # neighbours share pages
            self._guarded(lambda: self._write(rows))

    @property
    def _sql(self) -> sqlite3.Connection:
        assert self._connection is not None
        return self._connection

    def _open(self) -> None:
        assert self._path is not None
        if self._connection is not None:
            self._connection.close()
        timeout = min(self._wait_s, _TELL_AFTER_S)
        self._connection = sqlite3.connect(self._path, timeout=timeout, check_same_thread=False)
        self._sql.execute(f"PRAGMA page_size = {_PAGE_BYTES}")  # changes no existing file
        self._sql.execute(f"PRAGMA cache_size = -{_CACHE_KB}")
        with self._sql:
            self._sql.execute("BEGIN IMMEDIATE")  # so that a lock is noticed now, not hours later
            self._sql.execute(_TABLE)
        self._sql.execute("SELECT value FROM unnamed LIMIT 1").fetchone()

    def _write(self, rows: Iterable[tuple[str, Any]]) -> None:
        with self._sql:
            self._sql.executemany("REPLACE INTO unnamed (key, value) VALUES (?, ?)", rows)

    def _guarded(self, do: Callable[[], _T]) -> _T:
        """The result of `do`; a damaged file is renamed first, other errors are reported in one line."""
        try:
            try:
                return self._waiting(do)
            except sqlite3.DatabaseError as error:
                if _code(error) not in _BROKEN:
                    raise
                self._set_aside(str(error))
                return self._waiting(do)
        except (sqlite3.Error, OSError) as error:
            self.is_locked = _code(error) in _LOCKED
            raise (CacheFull if _code(error) in _FULL else EngineError)(self._trouble(error)) from None

    def _waiting(self, do: Callable[[], _T]) -> _T:
        """Return the result of `do` once no other process has locked the file; logs what it waits for after a while."""
        until, is_told = time.monotonic() + self._wait_s, False
        while True:
            try:
                return do()
            except sqlite3.OperationalError as error:
                if _code(error) not in _LOCKED or time.monotonic() >= until:
                    raise
                if not is_told:
                    is_told = True
                    hwarn(
                        f"HELM's cache {self._path} is locked by another process; this one waits up to "
                        f"{self._wait_s:.0f} s for it"
                    )

    def _trouble(self, error: Exception) -> str:
        code = _code(error)
        if code in _LOCKED:
            return (
                f"HELM's cache {self._path} is locked by another process for more than {self._wait_s:.0f} s; end that "
                "process, or give this one another --local-path"
            )
        if code in _FULL:
            assert self._path is not None
            free = shutil.disk_usage(self._path.parent).free
            return (
                f"HELM's cache {self._path} cannot be written ({error}); {free / 1e6:.1f} MB are free there: free some "
                "and run the same command again to continue"
            )
        return f"HELM's cache {self._path} cannot be used: {' '.join(str(error).split())}"

    def _set_aside(self, reason: str) -> None:
        """Rename the damaged file, begin a new one, and take over the rows that can be read."""
        assert self._path is not None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        aside = Path(f"{self._path}.corrupt-{datetime.now():%Y%m%dT%H%M%S}")
        for suffix in ("", "-journal", "-wal", "-shm"):  # a remaining journal would be applied to the new file
            if os.path.exists(f"{self._path}{suffix}"):
                os.replace(f"{self._path}{suffix}", f"{aside}{suffix}")
        self._open()
        rescued = self._rescue(aside)
        hwarn(
            f"HELM's cache {self._path} is damaged ({reason}); it is renamed to {aside}, {rescued} answers could be "
            "read and are kept, the others are computed again"
        )

    def _rescue(self, aside: Path) -> int:
        count = 0
        old = sqlite3.connect(f"{aside.absolute().as_uri()}?mode=ro", uri=True)
        old.text_factory = bytes  # a damaged key is no reason to give up the rows after it
        try:
            rows = _readable(old)
            while together := list(islice(rows, _AT_A_TIME)):
                self._write(together)
                count += len(together)
        finally:
            old.close()
        return count


def _readable(old: sqlite3.Connection) -> Iterator[tuple[str, Any]]:
    """Yield the rows that hold answers, up to where nothing can be read any more."""
    with suppress(sqlite3.Error):
        for name, value in old.execute("SELECT key, value FROM unnamed"):
            with suppress(UnicodeDecodeError):
                if isinstance(name, bytes) and _read(name.decode(), value) is not None:
                    yield name.decode(), value


def _head(name: str) -> dict[str, Any] | None:
    """Return the beginning of the key `name`, up to its "identity"; None if it has none."""
    try:
        key = json.loads(name)
    except (ValueError, RecursionError):
        return None
    if not isinstance(key, dict) or not isinstance(key.get("identity"), dict):
        return None
    head = {part: value for part, value in key.items() if part <= "identity"}
    return head if name.startswith(request_to_key(head)[:-1] + ",") else None


def _code(error: Exception) -> int:
    """SQLite's code of an error, 0 if it has none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _row(name: str, answer: Response) -> tuple[str, bytes]:
    """Make a row of the table: the answer as HELM writes it, with a checksum."""
    pickled = bytes(encode(answer))
    return name, pickled + _SUM + _digest(name, pickled)


def _digest(name: str, pickled: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\x00" + pickled).digest()


def _read(name: str, value: Any) -> Response | None:
    """Return the answer in a row; None if it holds none, or one that does not match its checksum.

    Rows of HELM's own, and of earlier releases, have no checksum.
    """
    try:
        pickled, mark, digest = bytes(value).rpartition(_SUM)
        if mark and digest != _digest(name, pickled):
            return None
        answer = decode(value)
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError, ValueError):
        return None
    return answer if answer and isinstance(answer, dict) else None
