"""Generates cases from valid content: documents with changed values, and damaged bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from hypothesis import strategies as st

Draw = Any

NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 8, 16, 255, 500, 10**4, 2**31 - 1, 2**31, -(2**31), 2**63, 10**18, 10**30),
    *(0.0, 0.5, -0.5, 1.0, 1e-9, 1e308, -1e308, float("inf"), float("-inf"), float("nan")),
]
TEXTS = [
    *("", " ", "a", "auto", "none", "null", "true", "1", "-1", "1e9", "a\nb", "a\x00b", "x" * 3000),
    *("../../../etc/passwd", "/etc/passwd", "~", "~nosuchuser/a", "C:\\a", ".", "..", "a/../../b"),
    *("\x1b[31m\x1b]0;title\x07", "\u009b31m", "\u202eabc", "\ud800", "\U0001f600", "\ufeff", "\u2028", "é" * 300),
    *("<script>alert(1)</script>", "{{ 7 * 7 }}", "%s%n", "${HOME}", "__class__", "torch.float16", "cuda:99"),
]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [None], {"a": None}, {"": {}}, [0] * 300]


def _nested(levels: int) -> Any:
    found: Any = []
    for _ in range(levels):
        found = [found]
    return found


OTHERS += [_nested(50), _nested(120)]


def values(*more: Any) -> st.SearchStrategy[Any]:
    """Values of every kind, among them values that parsers often fail on, and `more`."""
    return st.one_of(
        st.sampled_from([*NUMBERS, *TEXTS, *OTHERS]),
        *([st.sampled_from(more)] if more else []),
        st.integers(-10, 1000),
        st.floats(),
        st.text(max_size=8),
    )


def changed(documents: Sequence[Any], keys: Sequence[str] = (), more: Sequence[Any] = ()) -> st.SearchStrategy[Any]:
    """One of some documents with up to four changes: values replaced, moved or removed, keys added or renamed.

    `keys` are those that the document's readers know, `more` values that they know.
    """
    # Copies: what is changed in a list may be that list, which then would hold itself, here and in later cases.
    new, names = values(*more).map(copy.deepcopy), [*keys, *TEXTS]
    numbers = st.integers(0, (1 << 16) - 1)

    @st.composite
    def made(draw: Draw) -> Any:
        document = copy.deepcopy(documents[draw(numbers) % len(documents)])
        for _ in range(draw(numbers) % 5):
            places = list(_places(document))
            if not places:
                return draw(new)
            holder, key = places[draw(numbers) % len(places)]
            what = draw(numbers) % 7
            if what <= 2:
                holder[key] = draw(new)
            elif what == 3:
                del holder[key]
            elif what == 4:
                other, there = places[draw(numbers) % len(places)]
                holder[key] = copy.deepcopy(other[there])
            elif isinstance(holder, dict):
                name = names[draw(numbers) % len(names)]
                holder[name] = holder.pop(key) if what == 5 else draw(new)
            else:
                holder.insert(key, draw(new))
        return document

    return made()


def _places(document: Any) -> Any:
    """Return every value's position as (container, key or index); of large lists and mappings only the ends."""
    if isinstance(document, dict):
        inner = [*document.items()]
    elif isinstance(document, list):
        inner = [*enumerate(document)]
    else:
        return
    for key, value in inner if len(inner) <= 100 else [*inner[:20], *inner[-20:]]:
        yield document, key
        yield from _places(value)


WORDS = (b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 200)


def damaged(content: bytes, words: Sequence[bytes] = WORDS) -> st.SearchStrategy[bytes]:
    """Bytes with up to three faults: truncated, flipped, repeated or removed, or with one of `words` inserted."""
    return maybe_damaged(st.just(content), 1, words)


def maybe_damaged(
    contents: st.SearchStrategy[bytes], one_in: int = 4, words: Sequence[bytes] = WORDS
) -> st.SearchStrategy[bytes]:
    """The contents as they are, and damaged one time in `one_in`."""
    numbers, few = st.integers(0, (1 << 24) - 1), st.binary(max_size=8)

    @st.composite
    def made(draw: Draw) -> bytes:
        found = bytearray(draw(contents))
        if draw(numbers) % one_in:
            return bytes(found)
        for _ in range(1 + draw(numbers) % 3):
            at = draw(numbers) % (len(found) + 1)
            what = draw(numbers) % 6
            if what == 0:
                del found[at:]
            elif what == 1 and at < len(found):
                found[at] ^= 1 << draw(numbers) % 8
            elif what == 2:
                found[at:at] = found[at : at + draw(numbers) % 64]
            elif what == 3:
                del found[at : at + draw(numbers) % 64]
            elif what == 4:
                found[at:at] = words[draw(numbers) % len(words)]
            else:
                found[at : at + 8] = draw(few)
        return bytes(found)

    return made()


def as_json(document: Any) -> bytes:
    """Encode as Python does, which allows lone surrogates and NaN."""
    return json.dumps(document).encode()


def as_yaml(document: Any) -> bytes:
    """Encode as PyYAML does, including aliases."""
    text: str = yaml.safe_dump(document, allow_unicode=True, sort_keys=False)
    return text.encode(errors="surrogatepass")


def mappings(keys: Mapping[str, st.SearchStrategy[Any]], most: int = 6) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings of some of these keys, two times in three to the values listed for them, else to any."""
    names, numbers, other = sorted(keys), st.integers(0, (1 << 16) - 1), values()

    @st.composite
    def made(draw: Draw) -> dict[str, Any]:
        chosen = [names[draw(numbers) % len(names)] for _ in range(draw(numbers) % (most + 1))]
        return {name: draw(keys[name] if draw(numbers) % 3 else other) for name in chosen}

    return made()
