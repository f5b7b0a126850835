"""Records as JSON: written whole or not at all, and read back as the dataclasses that they are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from engine.errors import ConfigError
from engine.reading import MAX_JSON_BYTES, read_bytes

SINCE = {"may be missing": True}
"""Metadata of a field that records of earlier releases do not have: it then has its default."""

_Record = TypeVar("_Record")


def read_versioned(path: Path, kind: type[_Record], version: int, *, what: str, cure: str) -> _Record:
    """The record of dataclass `kind` in a JSON file whose key "version" must be `version`.

    Raises `ConfigError` for a file that cannot be read, is another version's, or is not `what` it should be; `cure`
    says what to do about it.
    """
    content = read_bytes(path, ConfigError, limit=MAX_JSON_BYTES)
    try:
        found = json.loads(content)  # halves of surrogate pairs included, which names of runs may have
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); {cure}") from None
    told = found.get("version") if isinstance(found, dict) else None
    if told != version:
        raise ConfigError(f"{path} has version {told!r}, this flexgen-helm reads {version}; {cure}")
    try:
        record: _Record = _decode(kind, found, "")
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{path} is no {what}: {error}; {cure}") from None
    return record


def _decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, as JSON has it, as what the annotation `kind` says; `ValueError` where it is not that."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None:
            return None
        (kind,) = (each for each in arguments if each is not type(None))
        return _decode(kind, value, where)
    if is_dataclass(kind):
        return _decode_fields(kind, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} is {value!r}, none of {', '.join(arguments)}")
        return value
    if origin is tuple:
        return tuple(
            _decode(arguments[0], each, f"{where}[{at}]") for at, each in enumerate(_expect(list, value, where))
        )
    if origin is Mapping:
        pairs = _expect(dict, value, where).items()
        return {
            key: each if arguments[1] is Any else _decode(arguments[1], each, f"{where}.{key}") for key, each in pairs
        }
    if kind is float:
        if not math.isfinite(_expect((int, float), value, where)):
            raise ValueError(f"{where} is {value}")
        return float(value)
    return _expect(kind, value, where)


def _decode_fields(kind: Any, value: Any, where: str) -> Any:
    hints, given = get_type_hints(kind), _expect(dict, value, where or "the file")
    names = [each.name for each in fields(kind)]
    inside = f"{where}." if where else ""
    optional = {each.name for each in fields(kind) if each.metadata.get("may be missing")}
    for name in names:
        if name not in given and name not in optional:
            raise ValueError(f"{inside}{name} is missing")
    for name in given:
        if name not in names:
            raise ValueError(f"{inside}{name} is unknown")
    return kind(**{name: _decode(hints[name], given[name], f"{inside}{name}") for name in names if name in given})


def _expect(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} is {str(value)[:40]!r} where a {_NAMES[kind]} is expected")
    return value


_NAMES: dict[Any, str] = {
    str: "text",
    bool: "truth value",
    int: "whole number",
    (int, float): "number",
    list: "list",
    dict: "mapping",
}
