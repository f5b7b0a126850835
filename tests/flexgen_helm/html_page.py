"""Reads a page as a browser would: what it shows, whether its elements close, whether it needs anything else."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "wbr", "br", "hr", "img", "input", "link", "source"}
FETCHING = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}


class Page(HTMLParser):
    """A parsed page; raises `AssertionError` for elements that do not close in order."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        """What is shown, titles that are pointed at included, style left out."""
        self.style = ""
        self._open: list[str] = []
        self.feed(content)
        self.close()
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"attributes twice: {attrs}"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1] == tag, f"</{tag}> closes <{self._open[-1]}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.style += data
        else:
            self.text += data

    def all(self, tag: str, kind: str | None = None) -> list[dict[str, str]]:
        """Attributes of all elements of a name, and of a class if one is given."""
        return [
            attrs for name, attrs in self.tags if name == tag and (not kind or kind in attrs.get("class", "").split())
        ]

    def assert_self_contained(self) -> None:
        """It loads nothing and runs nothing."""
        for tag, attrs in self.tags:
            assert tag not in {"script", "link", "iframe", "img", "object", "embed", "base", "form"}, tag
            for name in attrs:
                assert name not in FETCHING, (tag, name)
                assert not name.startswith("on"), (tag, name)
            assert "url(" not in attrs.get("style", "")
        for word in ("url(", "@import", "expression(", "javascript:"):
            assert word not in self.style.lower()
