"""The versions that must be equal on all machines, because the messages between them depend on them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("flexgen-helm", "ray")


def versions() -> dict[str, str]:
    """Return this machine's versions by name; "unknown" for a package without installed metadata."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"Python": python, **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
