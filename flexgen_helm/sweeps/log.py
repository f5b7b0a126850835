"""What a sweep logs: a rotated log file in the suite's directory, and JSON lines for machines."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from engine.errors import ConfigError

FILE_NAME = "flexgen_sweep.log"
LOG_BYTES = 1_000_000
LOG_FILES = 5
"""Number of old log files that are kept."""

logger = logging.getLogger("flexgen_helm.commands.sweep")


@contextmanager
def suite_log(suite_path: Path) -> Iterator[None]:
    """Write the records of `logger` and HELM's warnings to the suite's log while the context is active."""
    handler = RotatingFileHandler(
        suite_path / FILE_NAME, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8", delay=True
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk ends no sweep
    helm = logging.getLogger("helm")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for each in (logger, helm):
        each.addHandler(handler)
    try:
        yield
    finally:
        for each in (logger, helm):
            each.removeHandler(handler)
        with suppress(OSError):  # writes once more what a full disk has refused
            handler.close()


class JsonLog:
    """Appends events as JSON lines to a file, each whole and at once; without a path, does nothing."""

    def __init__(self, path: str | None) -> None:
        """Raises `ConfigError` for a file that cannot be written."""
        self._file: IO[str] | None = None
        if path is not None:
            try:
                self._file = Path(path).expanduser().open("a", encoding="utf-8", buffering=1)
            except OSError as error:
                raise ConfigError(f"--json-log {path} cannot be written: {error.strerror}") from None

    def __enter__(self) -> JsonLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as problem:
                logger.warning("the JSON log could not be closed: %s", problem)
            self._file = None

    def write(self, event: str, **facts: Any) -> None:
        """Write one event."""
        if self._file is None:
            return
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        try:
            self._file.write(json.dumps({"at": now, "event": event, **facts}) + "\n")
        except OSError as error:  # a full disk must not end a sweep
            logger.warning("the JSON log cannot be written: %s", error.strerror)
            with suppress(OSError):  # now: the garbage collector would print the error
                self._file.close()
            self._file = None
