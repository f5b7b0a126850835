"""What has to be the same on all machines: versions that the messages between them depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("flexgen-helm", "ray")


def versions() -> dict[str, str]:
    """Those of this machine, by name; a package that is not installed as one has "unknown"."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"Python": python, **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
