"""Control groups of our own, where the system lets a test make them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from engine.memory.control_groups import group_directories


@contextmanager
def made_group(controller: str, settings: dict[str, str]) -> Iterator[Path]:
    """A group of our own below one that this process is in, with what `settings` says of both versions."""
    if sys.platform != "linux":
        pytest.skip("there are no control groups")
    found = next((pair for pair in group_directories(controller) if pair[1].is_dir()), None)
    if found is None:
        pytest.skip(f"no group of {controller} is mounted")
    path = found[1] / f"flexgen-test-{os.getpid()}"
    try:
        path.mkdir()
        own = {name: text for name, text in settings.items() if (path / name).exists()}
        for name, text in own.items():
            (path / name).write_text(text)
    except OSError as error:
        with suppress(OSError):
            path.rmdir()
        pytest.skip(f"groups of {controller} cannot be made here: {error.strerror}")
    try:
        if not own:
            pytest.skip(f"groups here have nothing of {controller}")
        yield path
    finally:
        path.rmdir()


def run_in(group: Path, code: str, *arguments: str) -> list[int]:
    """What a process in `group` prints, as JSON."""
    enter = "import json, os, pathlib, sys\npathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
    command = [sys.executable, "-c", enter + code, str(group), *arguments]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    numbers: list[int] = json.loads(made.stdout)
    return numbers
