"""Reads files from outside: regular files only, of bounded size, depth and numbers, with one-line errors.

Every reader of JSON and YAML uses this module. Faults are raised as the error type that the caller names: a model's
file as `CheckpointError`, a policy as `ConfigError`. Sizes of memory, in files and on command lines, are read here too.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

from engine.errors import ConfigError, one_line, shown

MAX_JSON_BYTES = 100_000_000
"""The same limit as safetensors has for headers; the indices of the largest models take a tenth of it."""
MAX_YAML_BYTES = 1 << 18
_PIECE_BYTES = 1 << 20
_MAX_DEPTH = 100
_MAX_JSON_VALUES = 10_000_000
_MAX_YAML_VALUES = 200_000
"""The most values, with aliases expanded."""
_MAX_DIGITS = 40
"""The most digits of a number: tokenizers write 10^30 for a length without a limit."""
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b)?\s*", re.IGNORECASE)
_MOST_MEMORY = 1 << 60
"""The largest memory, in bytes."""
_UNITS = {
    f"{prefix}{infix}b": base ** (power + 1)
    for power, prefix in enumerate("kmgt")
    for infix, base in (("", 1000), ("i", 1024))
}


def find_file(path: Path, kind: type[Exception]) -> bool:
    """Whether `path` is a regular file, or leads to one; False where there is nothing.

    Raises `kind` for a path that is no file (a directory, a pipe, a device), and for one that cannot be accessed.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise kind(f"{_named(path)} cannot be read: {reason(error)}") from None
    if not stat.S_ISREG(mode):
        raise kind(f"{_named(path)} is {_what(mode)}; a regular file is expected there")
    return True


def open_file(path: Path, kind: type[Exception], *, where: str | None = None) -> IO[bytes]:
    """Open a regular file to read its bytes; raises `kind` for anything else, without waiting at a pipe."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise kind(f"{where or _named(path)} cannot be read: {reason(error)}") from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise kind(f"{where or _named(path)} is {_what(mode)}; a regular file is expected there")
    return open(handle, "rb")


def read_bytes(path: Path, kind: type[Exception], *, limit: int, where: str | None = None) -> bytes:
    """All bytes of a regular file of at most `limit` bytes; `where` names it in messages, else its path does."""
    try:
        with open_file(path, kind, where=where) as stream:
            content = read_at_most(stream, limit + 1)
    except OSError as error:
        raise kind(f"{where or _named(path)} cannot be read: {reason(error)}") from None
    if len(content) > limit:
        raise kind(f"{where or _named(path)} has more than {limit:,} bytes, which no such file needs")
    return content


def read_at_most(stream: IO[bytes], most: int) -> bytes:
    """The first `most` bytes of a stream, or all there are.

    It takes memory as bytes come: `stream.read(most)` would ask for all of it beforehand, which a limit may refuse.
    """
    parts, left = list[bytes](), most
    try:
        size = os.fstat(stream.fileno()).st_size + 1  # so that a regular file is read, and in memory, once
    except OSError:  # it is none of the system's
        size = _PIECE_BYTES
    while left and (part := stream.read(min(left, size))):
        parts.append(part)
        left, size = left - len(part), _PIECE_BYTES
    return b"".join(parts)


def read_json(path: Path, kind: type[Exception], *, limit: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file."""
    return parse_json(read_bytes(path, kind, limit=limit), _named(path), kind)


def read_json_object(path: Path, kind: type[Exception], *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The content of a JSON file that holds an object."""
    content = read_json(path, kind, limit=limit)
    if not isinstance(content, dict):
        raise kind(f"{_named(path)} holds {shown(content)}; a JSON object is expected there")
    return content


def parse_json(text: bytes, where: str, kind: type[Exception]) -> Any:
    """The content of JSON text in UTF-8; `where` names it in messages."""
    try:
        content = json.loads(text.decode("utf-8"), parse_int=_whole)
    except RecursionError:
        _too_deep(where, kind)
    except ValueError as error:  # no UTF-8, no JSON, or a number without end
        raise kind(f"{where} cannot be read: {one_line(error)}") from None
    _check(content, where, kind, _MAX_JSON_VALUES)
    return content


def read_yaml(path: Path, kind: type[Exception], *, what: str = "", limit: int = MAX_YAML_BYTES) -> Any:
    """The content of a YAML file, of plain values only; messages call it `what`."""
    where = f"{what} {_named(path)}".lstrip()
    return parse_yaml(read_bytes(path, kind, where=where, limit=limit), where, kind)


def parse_yaml(text: bytes, where: str, kind: type[Exception]) -> Any:
    """The content of YAML text in UTF-8; `where` names it in messages."""
    import yaml

    try:
        content = yaml.load(text.decode("utf-8"), _loader())
    except RecursionError:
        _too_deep(where, kind)
    except (yaml.YAMLError, ValueError) as error:
        raise kind(f"{where} is not YAML: {one_line(error)}") from None
    _check(content, where, kind, _MAX_YAML_VALUES)
    return content


@cache
def _loader() -> Any:
    """PyYAML's loader of plain values, with line numbers in errors, and without duplicate keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node: yaml.MappingNode = super().compose_mapping_node(anchor)
            seen: set[tuple[str, str]] = set()
            for key, _ in node.value:
                told = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
                if told in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"found the key {shown(key.value)} twice", key.start_mark
                    )
                if told is not None:
                    seen.add(told)
            return node

        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep=deep)
            except (yaml.YAMLError, RecursionError):
                raise
            except Exception:  # what its constructors happen to raise: KeyError, AttributeError, ValueError, …
                kind = node.tag.rpartition(":")[2]
                told = f"found {shown(node.value)}, which is no {kind}"
                raise yaml.constructor.ConstructorError(None, None, told, node.start_mark) from None

    return Loader


def reason(error: Exception) -> str:
    """The reason why a file cannot be read, without its name."""
    return getattr(error, "strerror", None) or one_line(error)


def expand_home(path: str | Path, kind: type[Exception], where: str) -> Path:
    """`path` with `~` expanded; raises `kind` for the home of an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise kind(f"{where}: {shown(str(path))} begins with the home of a user that there is not") from None


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _check(content: Any, where: str, kind: type[Exception], most: int) -> None:
    """Raise `kind` for content that is nested too deeply, has more than `most` values, or is not Unicode text."""
    level, depth, count = [content], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        if depth > _MAX_DEPTH:
            _too_deep(where, kind)
        if count > most:
            raise kind(f"{where} holds more than {most:,} values")
        following: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                following.extend(value.keys())
                following.extend(value.values())
            elif isinstance(value, list | tuple | set):
                following.extend(value)
            elif isinstance(value, str) and not value.isascii() and any("\ud800" <= each <= "\udfff" for each in value):
                raise kind(f"{where} holds {shown(value)}, which is no Unicode text (half of a surrogate pair)")
            elif isinstance(value, int) and value.bit_length() > 200:
                raise kind(f"{where} holds a number of {value.bit_length()} bits")
            if len(following) > most:
                raise kind(f"{where} holds more than {most:,} values")
        level = following


def _too_deep(where: str, kind: type[Exception]) -> NoReturn:
    raise kind(f"{where} is nested more than {_MAX_DEPTH} levels deep") from None


def _named(path: Path) -> str:
    text = str(path)
    if len(text) > 300:
        text = f"{text[:150]}...{text[-100:]}"
    return text if text.isprintable() else ascii(text)


def _what(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "no file"


def parse_bytes(value: Any, where: str) -> int:
    """Bytes of `"16GB"`, `"16GiB"` or a bare number of GiB; `ConfigError` otherwise."""
    # Of YAML's whole numbers, those beyond any memory cannot even be written as text.
    is_size = isinstance(value, str | float) or (type(value) is int and abs(value) <= _MOST_MEMORY)
    match = _SIZE.fullmatch(str(value)) if is_size else None
    if match is None:
        raise ConfigError(f'{where}: {shown(value)} is not a size; write "16GB", "16GiB" or a number of GiB')
    number, unit = match.groups()
    exact = float(number) * (_UNITS[unit.lower()] if unit else 1024**3)
    if exact > _MOST_MEMORY:
        raise ConfigError(f"{where}: {shown(value)} is more than any machine has")
    size = round(exact)
    if size <= 0:
        raise ConfigError(f"{where}: {shown(value)} is no memory at all")
    return size
