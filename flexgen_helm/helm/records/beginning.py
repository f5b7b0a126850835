"""The time when a suite began, as chat templates see it: the same in every command that continues the suite."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

from engine.errors import ConfigError
from engine.reading import find_file, read_bytes

FILE_NAME = "flexgen_suite.json"


class Beginning:
    """The beginning of the suite in a directory, as this or an earlier command recorded it.

    Raises `ConfigError` for a file that cannot be used.
    """

    def __init__(self, suite_path: Path) -> None:
        self._file = suite_path / FILE_NAME
        self.moment = self._kept() or datetime.now().replace(microsecond=0)
        """Local time, as `transformers` gives it to templates."""

    def _kept(self) -> datetime | None:
        if not find_file(self._file, ConfigError):
            return None
        content = read_bytes(self._file, ConfigError, limit=1_000)
        try:
            return datetime.fromisoformat(json.loads(content)["began"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(
                f'{self._file} does not say when the suite began ({{"began": "2026-11-29T23:50:00"}} is expected); '
                "remove it, and the suite begins now"
            ) from None

    def keep(self) -> None:
        """Record the moment atomically, unless it is recorded. Call it when something depends on the moment."""
        if self._file.exists():
            return
        scratch = self._file.with_name(f".{FILE_NAME}.{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps({"began": self.moment.isoformat()}) + "\n", encoding="utf-8")
            scratch.replace(self._file)
        except OSError as error:
            raise ConfigError(f"{self._file} cannot be written: {error.strerror}") from None
        finally:
            scratch.unlink(missing_ok=True)
