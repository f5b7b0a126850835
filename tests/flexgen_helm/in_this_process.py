"""Engines without processes of their own, for tests that are about something else."""

from __future__ import annotations

from typing import Any

from engine import Engine, Policy


def load_in_this_process(path: str, policy: Policy, window: int | None = None) -> Any:
    """What `EngineProcesses.load` does, in the process that asks."""
    return Engine.from_pretrained(path, policy, window=window)
