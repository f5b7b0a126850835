"""Protects: our cache file is HELM's own, both ways, durable batch by batch; its troubles are told and mended."""

from __future__ import annotations

import pickle
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from helm.common.cache import BlackHoleCacheConfig, Cache, SqliteCacheConfig
from helm.common.key_value_store import SqliteKeyValueStore

from engine.errors import ConfigError, EngineError
from flexgen_helm.helm import request_cache
from flexgen_helm.helm.request_cache import RequestCache

PAIRS = [({"prompt": f"number {n}", "temperature": 0.0}, {"completions": [{"text": "é" * n}]}) for n in range(4)]


@pytest.fixture
def config(tmp_path: Path) -> SqliteCacheConfig:
    return SqliteCacheConfig(str(tmp_path / "host.sqlite"))


def never() -> dict[str, Any]:
    raise AssertionError("computed what is in the cache")


def rows(path: str) -> list[tuple[str, bytes]]:
    with sqlite3.connect(path) as connection:
        return connection.execute("SELECT * FROM unnamed ORDER BY key").fetchall()


def test_helm_reads_what_we_write_and_the_other_way_round(config: SqliteCacheConfig, tmp_path: Path) -> None:
    with RequestCache(config) as cache:
        assert cache.get(PAIRS[0][0]) is None
        cache.put(PAIRS)
    helms = Cache(config)
    assert [helms.get(key, never) for key, _ in PAIRS] == [(answer, True) for _, answer in PAIRS]
    other = SqliteCacheConfig(str(tmp_path / "helms.sqlite"))
    for key, answer in PAIRS:
        Cache(other).get(key, lambda answer=answer: answer)
    with RequestCache(other) as cache:
        assert [cache.get(key) for key, _ in PAIRS] == [answer for _, answer in PAIRS]
    for ours, helms in zip(rows(config.path), rows(other.path), strict=True):  # byte for byte, and a sum behind
        assert ours[0] == helms[0]
        assert ours[1].startswith(helms[1])


def test_a_batch_is_kept_whole_or_not_at_all(config: SqliteCacheConfig) -> None:
    unwritable = ({"prompt": "x"}, {"f": lambda: None})
    with RequestCache(config) as cache:
        cache.put(PAIRS[:1])
        with pytest.raises((pickle.PicklingError, AttributeError)):
            cache.put([*PAIRS[1:], unwritable])
        assert len(rows(config.path)) == 1
        cache.put([(PAIRS[0][0], {"other": 1})])
    assert Cache(config).get(PAIRS[0][0], never) == ({"other": 1}, True)


def test_what_is_written_survives_a_kill(config: SqliteCacheConfig) -> None:
    program = f"""
import os, signal
from helm.common.cache import SqliteCacheConfig
from flexgen_helm.helm.request_cache import RequestCache
with RequestCache(SqliteCacheConfig({config.path!r})) as cache:
    cache.put({PAIRS!r})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    with RequestCache(config) as cache:
        assert [cache.get(key) for key, _ in PAIRS] == [answer for _, answer in PAIRS]


def test_without_a_cache_nothing_is_kept() -> None:
    with RequestCache(BlackHoleCacheConfig()) as cache:
        cache.put(PAIRS)
        assert cache.get(PAIRS[0][0]) is None


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(request_cache, "hwarn", said.append)
    return said


@pytest.mark.parametrize("damage", ["no database", "a page", "cut off"])
def test_a_damaged_file_is_set_aside_named_and_rebuilt(
    damage: str, config: SqliteCacheConfig, tmp_path: Path, warnings: list[str]
) -> None:
    many = [({"prompt": str(n)}, {"text": str(n) * 500}) for n in range(200)]
    with RequestCache(config) as cache:
        cache.put(many)
    path = Path(config.path)
    content = path.read_bytes()
    middle = len(content) // 2 // 4096 * 4096
    broken = {
        "no database": b"not a database " * 999,
        "a page": content[:middle] + b"\xff" * 4096 + content[middle + 4096 :],
        "cut off": content[:middle],
    }[damage]
    path.write_bytes(broken)
    with RequestCache(config) as cache:
        found = {n: cache.get(key) for n, (key, _) in enumerate(many)}
        cache.put(many)
        assert [cache.get(key) for key, _ in many] == [answer for _, answer in many]
    assert all(answer in (None, many[n][1]) for n, answer in found.items())
    if damage == "a page":  # what lies before it can be read
        assert sum(answer is not None for answer in found.values()) > 20
    (aside,) = tmp_path.glob("host.sqlite.corrupt-*")
    assert aside.read_bytes() == broken
    (line,) = warnings
    assert str(aside) in line
    assert str(path) in line
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def damage_a_key(path: str, number: int) -> None:
    """One that is no text any more."""
    with sqlite3.connect(path) as connection:
        name = connection.execute("SELECT key FROM unnamed ORDER BY key").fetchall()[number][0]
        torn = b"\xff" + name.encode()[1:]
        connection.execute("UPDATE unnamed SET key = CAST(? AS TEXT) WHERE key = ?", (torn, name))


def test_a_damaged_key_costs_its_row_only(config: SqliteCacheConfig, warnings: list[str]) -> None:
    many = [({"prompt": f"{n:03}"}, {"text": str(n) * 500}) for n in range(200)]
    with RequestCache(config) as cache:
        cache.put(many)
    damage_a_key(config.path, 0)
    with RequestCache(config) as cache:
        assert [cache.get(key) for key, _ in many] == [None, *(answer for _, answer in many[1:])]
    path = Path(config.path)
    content = path.read_bytes()
    path.write_bytes(content[:-4096] + b"\xff" * 4096)  # now what can be read is taken over
    with RequestCache(config) as cache:
        found = [cache.get(key) for key, _ in many]
        cache.put(many[-1:])
        assert found[0] is None
        assert sum(answer is not None for answer in found) > 100
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_row_that_holds_no_answer_counts_as_none(config: SqliteCacheConfig) -> None:
    with SqliteKeyValueStore(config.path) as store:
        store.put({"prompt": "empty"}, {})
    with sqlite3.connect(config.path) as connection:
        connection.execute("INSERT INTO unnamed VALUES (?, ?)", ('{"prompt": "torn"}', b"\x80\x05torn"))
    with RequestCache(config) as cache:
        assert cache.get({"prompt": "empty"}) is None
        assert cache.get({"prompt": "torn"}) is None


def test_a_file_that_another_process_has_locked_is_told(config: SqliteCacheConfig) -> None:
    with RequestCache(config) as cache:
        cache.put(PAIRS[:1])
        other = sqlite3.connect(config.path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        quick = RequestCache(config, wait_s=0.05)
        with pytest.raises(ConfigError, match=r"host\.sqlite is locked by another process .*--local-path"), quick:
            pass
        other.execute("ROLLBACK")
        with quick as late:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(EngineError, match="locked by another process") as caught:
                late.put(PAIRS)
            assert type(caught.value) is EngineError  # a fault, no bad input
            other.execute("ROLLBACK")
            late.put(PAIRS)
    assert len(rows(config.path)) == len(PAIRS)


def test_a_full_disk_is_told_with_the_numbers(config: SqliteCacheConfig) -> None:
    with RequestCache(config) as cache:
        cache.put(PAIRS[:1])
        cache._sql.execute("PRAGMA max_page_count = 3")  # SQLite's own way to run out of room
        with pytest.raises(EngineError, match=r"host\.sqlite cannot be written .* MB are free there: free some"):
            cache.put([({"prompt": "long"}, {"text": "x" * 100_000})])
        cache._sql.execute("PRAGMA max_page_count = 1000000")
        cache.put(PAIRS)
    assert len(rows(config.path)) == len(PAIRS)


def test_a_database_of_something_else_is_refused(config: SqliteCacheConfig) -> None:
    with sqlite3.connect(config.path) as connection:
        connection.execute("CREATE TABLE unnamed (name TEXT)")
    with pytest.raises(ConfigError, match=r"host\.sqlite cannot be used: no such column"), RequestCache(config):
        pass


def test_a_flipped_bit_that_sqlite_does_not_notice_is_no_answer(config: SqliteCacheConfig) -> None:
    """Any bit of a row: the answer is what was written, or none; HELM's own reader takes what it takes."""
    key, answer = PAIRS[2]
    with RequestCache(config) as cache:
        cache.put(PAIRS)
        ((name, value),) = [row for row in rows(config.path) if "number 2" in row[0]]
        wrong = 0
        for at in range(0, 8 * len(value), 3):
            flipped = bytearray(value)
            flipped[at // 8] ^= 1 << at % 8
            cache._sql.execute("UPDATE unnamed SET value = ? WHERE key = ?", (bytes(flipped), name))
            cache._sql.commit()
            found = cache.get(key)
            assert found in (None, answer)
            wrong += found is None
        assert wrong > 8 * len(value) / 3 * 0.5
        cache._sql.execute("UPDATE unnamed SET value = ? WHERE key = ?", (value, name))
        cache._sql.commit()
        assert cache.get(key) == answer


def test_an_answer_under_another_key_is_none(config: SqliteCacheConfig) -> None:
    with RequestCache(config) as cache:
        cache.put(PAIRS)
    with sqlite3.connect(config.path) as connection:
        connection.execute("UPDATE unnamed SET key = replace(key, 'number 3', 'number 9')")
    with RequestCache(config) as cache:
        assert cache.get({"prompt": "number 9", "temperature": 0.0}) is None


def test_rows_of_an_earlier_release_are_read(config: SqliteCacheConfig) -> None:
    with SqliteKeyValueStore(config.path) as store:
        for key, answer in PAIRS:
            store.put(key, answer)
    with RequestCache(config) as cache:
        assert [cache.get(key) for key, _ in PAIRS] == [answer for _, answer in PAIRS]


def test_what_a_locked_file_is_waited_for_is_told_and_the_wait_ends_with_the_lock(
    config: SqliteCacheConfig, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_cache, "_TELL_AFTER_S", 0.05)
    with RequestCache(config) as cache:
        cache.put(PAIRS[:1])
    other = sqlite3.connect(config.path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    timer = threading.Timer(0.5, other.execute, ("ROLLBACK",))
    timer.start()
    with RequestCache(config, wait_s=20.0) as cache:
        assert cache.get(PAIRS[0][0]) == PAIRS[0][1]
    timer.join()
    (line,) = warnings
    assert "host.sqlite is locked by another process; this one waits up to 20 s for it" in line
