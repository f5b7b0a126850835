"""Regular expressions for names of modules: matched as peft does, within a time limit.

peft matches by `re`, which cannot be interrupted: a pattern of repeats in repeats would never end. Patterns are matched
by `regex` here, and those that the two packages read differently are refused.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]

from engine.errors import CheckpointError, shown

_MOST_CHARACTERS = 10_000
_MOST_COPIES = 100
"""`regex` compiles what is repeated as often as it must occur."""
_MATCH_S = 1.0
"""Processor time of one match; it takes microseconds."""
_READ_DIFFERENTLY = re.compile(r"\{(?!\d*,?\d*\})|\[:")
"""Approximate matches and POSIX classes of `regex`."""


def end_of_name(pattern: str) -> str:
    """The expression by which peft finds ranks and alphas: the pattern is a name, or its last parts."""
    return rf"(.*\.)?({pattern})$"


def part_of_name(pattern: str) -> str:
    """The expression by which peft finds modules that are replaced, and those inside them."""
    return rf"(^|.*\.){pattern}($|\..*)"


def check_pattern(file: Path, pattern: str, expression: str) -> None:
    """Raise `CheckpointError` unless a pattern from `file`, and the `expression` made of it, can be matched."""
    try:
        if len(pattern) > _MOST_CHARACTERS:
            raise ValueError(f"more than {_MOST_CHARACTERS:,} characters")
        re.compile(pattern)
        re.compile(expression)
        if found := _READ_DIFFERENTLY.search(pattern):
            raise ValueError(f"{found[0]} at position {found.start()} is not understood here")
        if (copies := math.prod(max(1, int(count)) for count in re.findall(r"\{(\d+)", pattern))) > _MOST_COPIES:
            raise ValueError(f"its repeats multiply to {shown(copies)}, and {_MOST_COPIES} are allowed")
        _compiled(expression)
    except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file}: {shown(pattern)} is no pattern of names of modules ({error})") from None


def matches(file: Path, expression: str, module: str, *, whole: bool = False) -> bool:
    """Whether the start of a module's name, or the `whole`, matches a checked expression.

    Raises `CheckpointError` where that takes too long to tell.
    """
    compiled = _compiled(expression)
    try:
        return (compiled.fullmatch if whole else compiled.match)(module, timeout=_MATCH_S) is not None
    except TimeoutError:
        raise CheckpointError(
            f"{file}: whether the pattern {shown(expression)} matches the module {shown(module)} is not told in "
            f"{_MATCH_S:.0f} s; write it without repeats in repeats"
        ) from None


@lru_cache(maxsize=4096)  # more than an adapter has: the cache of `regex` itself holds 500
def _compiled(expression: str) -> Any:
    return regex.compile(expression, regex.VERSION0)
