"""The record of how the answers in a file were made: `FILE.record.json`, next to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.identity.result import differences
from engine.errors import ConfigError
from engine.memory.replaced import replace_text
from engine.reading import find_file, read_json_object
from flexgen_helm.planning.environment import environment
from flexgen_helm.terminal.errors import RunFailed

VERSION = 1


class AnswersRecord:
    """The record of the answers in a file: what an earlier run left, and what this one writes in its place."""

    def __init__(self, answers: Path | None) -> None:
        """Read what is there; answers on standard output, None, have no record.

        Raises `ConfigError` where a file of that name is no record.
        """
        self._path = None if answers is None else answers.with_name(f"{answers.name}.record.json")
        self._earlier: Mapping[str, Any] = {}
        if self._path is not None and find_file(self._path, ConfigError):
            self._earlier = read_json_object(self._path, ConfigError)
            kinds = {"environments": list, "identity": dict}
            if self._earlier.get("version") != VERSION or not all(
                isinstance(self._earlier.get(name), kind) for name, kind in kinds.items()
            ):
                raise ConfigError(
                    f"{self._path} is no record of `complete`, version {VERSION}; remove it, or name another --output"
                )

    def what_differs(self, identity: Mapping[str, object]) -> str:
        """Why existing answers may belong to another model identity or other settings than the current ones."""
        if not self._earlier:
            return "prompt, settings or model differ"
        told = differences(self._earlier["identity"], identity)
        return f"other {told}" if told else "prompt or settings differ"

    def write(self, made: Mapping[str, Any], *, goes_on: bool) -> None:
        """Write how the answers are made: `made`, its "identity" included, and this process's environment.

        A file that is continued keeps the environments of earlier processes, without duplicates. Raises `RunFailed`
        where the record cannot be written.
        """
        if self._path is None:
            return
        found = [*(self._earlier.get("environments", ()) if goes_on else ()), environment().as_mapping()]
        unique = [each for at, each in enumerate(found) if each not in found[:at]]
        try:
            replace_text(self._path, json.dumps({"version": VERSION, **made, "environments": unique}, indent=1) + "\n")
        except OSError as error:
            raise RunFailed(f"{self._path} cannot be written: {error.strerror}; name another --output") from None
