"""Adds named entries to the lists of YAML files that people edit, without changing what is in them."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError, one_line
from engine.memory.replaced import replace_text
from engine.reading import find_file, parse_yaml, read_bytes

Addition = tuple[Path, str, Mapping[str, Any]]
"""A file, the top-level key whose value is a list, and the entry to add; the entry has a `name`."""


MAX_BYTES = 1 << 21
"""Six times HELM's own list of all models."""
_WAIT_S = 30.0
"""Longest wait, in seconds, for another process to add its entries, which are a few lines."""


def add_to_yaml_lists(
    additions: Sequence[Addition],
    made: Callable[[Path], None] = lambda file: None,
    as_now: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda entry: entry,
) -> list[str]:
    """Add each entry whose name its list does not have; return one line for each that is there with other content.

    `as_now` says what an entry of a file would be today, where earlier versions wrote the same in another way.
    All files are checked before the first is written, each is replaced as a whole, and processes that do so at once
    wait for each other. `made` is called with each file that was not there before. Raises `ConfigError` for a file that
    cannot be read, extended or written.
    """
    notices: list[str] = []
    texts: dict[Path, str] = {}
    with _held({path.parent for path, _, _ in additions}):
        for path, key, entry in additions:
            text = texts.get(path) if path in texts else _read(path)
            known = _entries(path, key, text or "")
            same_name = [other for other in known if isinstance(other, Mapping) and other.get("name") == entry["name"]]
            if not same_name:
                texts[path] = _with_entry(path, key, text or "", entry)
            elif as_now(same_name[-1]) != entry:
                notices.append(f"{path} has another entry {entry['name']}; that entry was kept")
        for path, text in texts.items():
            is_new = not path.exists()
            _replace(path, text)
            if is_new:
                made(path)
    return notices


@contextmanager
def _held(folders: set[Path]) -> Iterator[None]:
    """Lock the folders, created if necessary, against other processes that add entries; else `ConfigError`."""
    handles: list[int] = []
    try:
        for folder in sorted(folders):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                handles.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
            except OSError as error:
                raise ConfigError(
                    f"cannot write {folder}: {error.strerror}; name a directory that can be written"
                ) from None
            _lock(handles[-1], folder)
        yield
    finally:
        for handle in handles:
            os.close(handle)  # which gives the lock up


def _lock(handle: int, folder: Path) -> None:
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"another process has been adding entries to {folder} for {_WAIT_S:.0f} s; end it, or name another "
                    "--local-path"
                ) from None
            time.sleep(0.02)
        except OSError:
            return  # a file system without locks on folders: as good as it gets there


def _read(path: Path) -> str:
    if not find_file(path, ConfigError):
        return ""
    content = read_bytes(path, ConfigError, limit=MAX_BYTES)
    try:
        return content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: {one_line(error)}") from None


def _entries(path: Path, key: str, text: str) -> list[Any]:
    content = parse_yaml(text.encode(), str(path), ConfigError)
    if content is None:
        return []
    entries = content.get(key) if isinstance(content, Mapping) else content
    if entries is None:
        return []
    if not isinstance(content, Mapping) or not isinstance(entries, list):
        raise ConfigError(f"{path} has no list under {key!r}; mend it, or use another local path")
    return entries


def _with_entry(path: Path, key: str, text: str, entry: Mapping[str, Any]) -> str:
    """Return `text` with the entry first in its list: where HELM takes the last entry, it remains the user's."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    found = None
    if isinstance(node, yaml.MappingNode):
        found = next(((k, v) for k, v in node.value if k.value == key), None)
    if found is None:
        start = text if not text or text.endswith("\n") else text + "\n"
        extended = f"{start}{key}:\n{_block(entry, 2)}"
    elif isinstance(found[1], yaml.SequenceNode) and found[1].flow_style:
        inside = found[1].start_mark.index + 1
        flow = yaml.safe_dump(dict(entry), default_flow_style=True, sort_keys=False, width=float("inf")).strip()
        extended = f"{text[:inside]}{flow}{', ' if found[1].value else ''}{text[inside:]}"
    else:
        extended = _with_block_entry(text, *found, entry)
    if not _holds(extended, key, [dict(entry), *_entries(path, key, text)]):
        raise ConfigError(f"cannot add {entry['name']} to the list {key!r} in {path}; write that list as a plain block")
    return extended


def _holds(text: str, key: str, entries: list[Any]) -> bool:
    try:
        return bool(yaml.safe_load(text)[key] == entries)
    except yaml.YAMLError:
        return False


def _with_block_entry(text: str, key: yaml.Node, value: yaml.Node, entry: Mapping[str, Any]) -> str:
    indent = value.start_mark.column if isinstance(value, yaml.SequenceNode) else 2
    lines = text.splitlines(keepends=True)
    line = key.end_mark.line
    if not lines[line].endswith("\n"):
        lines[line] += "\n"
    return "".join([*lines[: line + 1], _block(entry, indent), *lines[line + 1 :]])


def _block(entry: Mapping[str, Any], indent: int) -> str:
    dumped = yaml.safe_dump([dict(entry)], sort_keys=False, allow_unicode=True, width=120)
    return "".join(" " * indent + line for line in dumped.splitlines(keepends=True))


def _replace(path: Path, text: str) -> None:
    path = path.resolve()  # a link stays a link
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; name a directory that can be written") from None
