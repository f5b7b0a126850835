"""An argument parser whose errors are one line; imports nothing of the engine, so that `doctor` runs without it."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flexgen_helm.terminal.errors import UsageError

_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""Bytes, on all file systems that are in use, and on Linux."""
_LONGEST_MESSAGE = 500
"""argparse repeats what it does not know, however long it is."""


class Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError` instead of printing the usage and exiting.

    `examples` are whole command lines, shown at the end of its help. `texts` are the arguments that name no file: in
    the others, what no file system takes is refused. `prompts` may hold any bytes.
    """

    def __init__(
        self,
        *,
        examples: Sequence[str] = (),
        texts: Sequence[str] = (),
        prompts: Sequence[str] = (),
        epilog: str | None = None,
        **others: Any,
    ) -> None:
        shown = "\n".join(["examples:", *(f"  {line}" for line in examples)]) if examples else None
        ending = "\n\n".join(part.strip("\n") for part in (epilog, shown) if part) or None
        super().__init__(**{"formatter_class": _Formatter, "epilog": ending, **others})
        self._texts, self._prompts = {*texts, *prompts}, set(prompts)
        self._by_title: dict[str, argparse._ArgumentGroup] = {}

    def group(self, title: str, description: str | None = None) -> argparse._ArgumentGroup:
        """The group of that title, created at first use: groups are shown in that order."""
        if title not in self._by_title:
            self._by_title[title] = self.add_argument_group(title, description)
        return self._by_title[title]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as usual; raises `UsageError` also for invalid names of files."""
        found, rest = super().parse_known_args(args, namespace)
        for name, text in _texts_of(found):
            problem = None if name in self._prompts else _no_text(text)
            if problem is None and name not in self._texts:
                problem = _no_path(text)
            if problem is not None:
                self.error(f"argument {self._shown(name)}: {text[:40]!a}{'...' if len(text) > 40 else ''} {problem}")
        return found, rest

    def _shown(self, name: str) -> str:
        actions = [action for action in self._actions if action.dest == name]
        return "/".join(actions[0].option_strings) or str(actions[0].metavar) if actions else name

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError`."""
        cut = message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}..."
        raise UsageError(f"{cut} (see {self.prog} --help)")


def _texts_of(found: argparse.Namespace) -> Iterator[tuple[str, str]]:
    for name, value in vars(found).items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str | Path):
                yield name, str(each)


def _no_text(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is not UTF-8; what is named so must be renamed"
    return None


def _no_path(text: str) -> str | None:
    longest = max(len(os.fsencode(part)) for part in text.split(os.sep))
    if longest > _LONGEST_NAME:
        return f"has a name of {longest} bytes, and file systems take {_LONGEST_NAME}"
    if len(os.fsencode(text)) > _LONGEST_PATH:
        return f"has {len(os.fsencode(text))} bytes, and a path at most {_LONGEST_PATH}"
    if text.startswith("~") and os.path.expanduser(text) == text:
        return "names the home directory of a user who has none here; write the directory"
    return None


class _Formatter(argparse.HelpFormatter):
    """Wraps each paragraph; lines that are indented, and the one before them, stay lines of their own."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = [part for part in text.strip("\n").split("\n\n") if part.strip()]
        return "\n\n".join(self._filled(part, width, indent) for part in paragraphs)

    def _filled(self, paragraph: str, width: int, indent: str) -> str:
        if "\n  " in f"\n{paragraph}":
            return textwrap.indent(paragraph, indent)
        return super()._fill_text(paragraph, width, indent)
