"""An argument parser whose errors are one line; imports nothing of the engine, so that `doctor` runs without it."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from flexgen_helm.terminal.errors import UsageError


class Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError` instead of printing the usage and exiting.

    `examples` are whole command lines, shown at the end of its help.
    """

    def __init__(self, *, examples: Sequence[str] = (), epilog: str | None = None, **others: Any) -> None:
        shown = "\n".join(["examples:", *(f"  {line}" for line in examples)]) if examples else None
        ending = "\n\n".join(part.strip("\n") for part in (epilog, shown) if part) or None
        super().__init__(**{"formatter_class": _Formatter, "epilog": ending, **others})
        self._by_title: dict[str, argparse._ArgumentGroup] = {}

    def group(self, title: str, description: str | None = None) -> argparse._ArgumentGroup:
        """The group of that title, made when it is first asked for: groups are shown in that order."""
        if title not in self._by_title:
            self._by_title[title] = self.add_argument_group(title, description)
        return self._by_title[title]

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError`."""
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Formatter(argparse.HelpFormatter):
    """Wraps each paragraph; lines that are indented, and the one before them, stay lines of their own."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = [part for part in text.strip("\n").split("\n\n") if part.strip()]
        return "\n\n".join(self._filled(part, width, indent) for part in paragraphs)

    def _filled(self, paragraph: str, width: int, indent: str) -> str:
        if "\n  " in f"\n{paragraph}":
            return textwrap.indent(paragraph, indent)
        return super()._fill_text(paragraph, width, indent)
