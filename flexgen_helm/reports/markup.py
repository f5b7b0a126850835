"""HTML and SVG as text in which everything is escaped that is not markup itself."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
"""Characters that neither HTML nor UTF-8 has."""
_VOID = frozenset({"meta", "wbr"})


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def text(content: object) -> Markup:
    """Any content as markup: escaped, unless it is markup."""
    if isinstance(content, Markup):
        return content
    return Markup(html.escape(_NO_TEXT.sub("�", str(content)), quote=True))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element; a child that is None is left out, as is an attribute; `class_` is `class`, `a_b` is `a-b`."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{told}>")
    return Markup(f"<{name}{told}>{join(children)}</{name}>")


def breakable(name: str) -> Markup:
    """A name without spaces that may go on in the next line after its signs."""
    parts = re.split("(?<=[_,=:/])(?=[^_,=:/])", name)
    return Markup(tag("wbr").join(text(part) for part in parts))


def join(parts: Iterable[object]) -> Markup:
    """Parts one after the other, without those that are None."""
    return Markup("".join(text(part) for part in parts if part is not None))
