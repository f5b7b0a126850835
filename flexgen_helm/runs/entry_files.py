"""Reads files of run entries and their includes: regular files of limited size, and nothing from a network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, EngineError, named
from engine.reading import read_bytes

if TYPE_CHECKING:
    from helm.benchmark.presentation.run_entry import RunEntry

_MOST_BYTES = 1 << 18
"""The most bytes of a file with all its includes: eight times the longest list that is shipped."""
_LEAST_BYTES = 256
"""The bytes that a file counts for at least, because small files that include each other twice would never end."""


def read_entry_file(path: Path) -> list[RunEntry]:
    """The entries of a HOCON file, as HELM reads it; `ConfigError` for a file, or an included one, that is none."""
    import dacite
    from helm.benchmark.presentation.run_entry import RunEntries
    from helm.common.general import parse_hocon

    files = _Files()
    text = files.text_of(path)
    try:
        with _including(files):
            found: list[RunEntry] = dacite.from_dict(RunEntries, parse_hocon(text)).entries
    except EngineError:
        raise
    except Exception as error:  # pyhocon and dacite may raise anything
        raise ConfigError(f"{path} is not a file of run entries: {named(error)}") from None
    if not found:
        raise ConfigError(f'{path} has no run entries; write entries: [{{description: "...", priority: 1}}]')
    return found


class _Files:
    """The files from which a list of entries is read."""

    def __init__(self) -> None:
        self._left = _MOST_BYTES

    def text_of(self, path: Path) -> str:
        """Return the content of a file; `ConfigError` if it is none, or all of them together are too long."""
        content = read_bytes(path, ConfigError, limit=_MOST_BYTES)
        self._left -= max(len(content), _LEAST_BYTES)
        if self._left < 0:
            raise ConfigError(
                f"{path}: run entries with all that they include have more than {_MOST_BYTES:,} bytes; cut the list "
                "into several files"
            )
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 (byte {error.start}); convert it") from None


@contextmanager
def _including(files: _Files) -> Iterator[None]:
    """Make pyhocon read included files through `files`, because its parser has no parameter for that."""
    from pyhocon import config_parser  # type: ignore[import-untyped]

    stock = config_parser.ConfigFactory

    class Bounded(stock):  # type: ignore[misc, valid-type]
        @classmethod
        def parse_file(cls, filename: str, encoding: str = "utf-8", required: bool = True, **options: Any) -> Any:
            if not required and not os.path.lexists(filename):
                return []
            return cls.parse_string(files.text_of(Path(filename)), os.path.dirname(filename), **options)

        @classmethod
        def parse_URL(cls, url: str, **_: Any) -> Any:
            raise ConfigError(f"run entries include {url}; only files are read, fetch it beforehand")

    config_parser.ConfigFactory = Bounded
    try:
        yield
    finally:
        config_parser.ConfigFactory = stock
