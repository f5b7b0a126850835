"""HELM's JSON of its dataclasses, byte for byte, without the copies and the slow encoder that HELM uses for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from dataclasses import fields
from functools import cache
from json.encoder import encode_basestring_ascii
from typing import Any, cast

_SCALARS: dict[type, Callable[[Any], str]] = {str: encode_basestring_ascii, int: int.__repr__}
"""Exactly these types; all others are encoded in the general way."""


def dumps(content: Any) -> str:
    """`json.dumps(asdict_without_nones(content), indent=2)`; `content` may also be a list of dataclasses."""
    parts: list[str] = []
    _add(content, "\n", parts)
    return "".join(parts)


def _add(value: Any, line: str, parts: list[str]) -> None:
    """Append the text of `value`; `line` is a line break with the indentation of `value`."""
    scalar = _SCALARS.get(type(value))
    if scalar is not None:
        parts.append(scalar(value))
    elif hasattr(type(value), "__dataclass_fields__"):
        found = [
            (name, each) for name in _names(cast(Hashable, type(value))) if (each := getattr(value, name)) is not None
        ]
        _add_items(found, line, parts)
    elif isinstance(value, dict):
        _add_items([(_key(key), each) for key, each in value.items()], line, parts)
    elif isinstance(value, list | tuple):
        if not value:
            parts.append("[]")
            return
        before = "["
        for each in value:
            parts.append(f"{before}{line}  ")
            _add(each, f"{line}  ", parts)
            before = ","
        parts.append(f"{line}]")
    else:
        parts.append(json.dumps(value))


def _add_items(items: list[tuple[str, Any]], line: str, parts: list[str]) -> None:
    if not items:
        parts.append("{}")
        return
    before = "{"
    for name, each in items:
        parts.append(f"{before}{line}  {encode_basestring_ascii(name)}: ")
        _add(each, f"{line}  ", parts)
        before = ","
    parts.append(f"{line}}}")


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _key(key: Any) -> str:
    """Encode a key as JSON does."""
    return key if isinstance(key, str) else next(iter(json.loads(json.dumps({key: None}))))
