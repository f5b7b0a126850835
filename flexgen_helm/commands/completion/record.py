"""What the answers in a file were made with: `FILE.record.json` beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.reading import find_file, read_json_object
from flexgen_helm.planning.environment import environment
from flexgen_helm.planning.stored import replace_text
from flexgen_helm.terminal.errors import RunFailed

VERSION = 1


def write_record(answers: Path, made: Mapping[str, Any], *, goes_on: bool) -> Path:
    """Say what the answers in the file `answers` are made with: `made`, and this process's environment.

    A file that is gone on with keeps the environments of those before, each once. Raises `ConfigError` where a file of
    that name is no record, `RunFailed` where it cannot be written.
    """
    path = answers.with_name(f"{answers.name}.record.json")
    found = [*(_environments(path) if goes_on else ()), environment().as_mapping()]
    unique = [each for at, each in enumerate(found) if each not in found[:at]]
    try:
        replace_text(path, json.dumps({"version": VERSION, **made, "environments": unique}, indent=1) + "\n")
    except OSError as error:
        raise RunFailed(f"{path} cannot be written: {error.strerror}; name another --output") from None
    return path


def _environments(path: Path) -> list[Any]:
    if not find_file(path, ConfigError):
        return []  # answers of an earlier release have none
    found = read_json_object(path, ConfigError)
    if found.get("version") != VERSION or not isinstance(found.get("environments"), list):
        raise ConfigError(f"{path} is no record of `complete`, version {VERSION}; remove it, or name another --output")
    return list(found["environments"])
