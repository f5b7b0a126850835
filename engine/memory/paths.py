"""Directories: the nearest existing one, the type of its file system, and this project's cache directory."""

from __future__ import annotations

import os
from pathlib import Path

from engine.errors import ConfigError
from engine.reading import expand_home


def existing_parent(directory: str) -> str:
    """`directory`, or its nearest parent that exists."""
    path = os.path.abspath(os.path.expanduser(directory))
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


_NETWORK = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "beegfs", "gpfs", "glusterfs", "afs", "fuse.sshfs", "fuse.s3")


def network_file_system(directory: str) -> str | None:
    """The type of the network file system of `directory` (which need not exist); None for local or unknown ones."""
    device = os.stat(existing_parent(directory)).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8") as stream:
            mounts = [line.split() for line in stream]
    except OSError:
        return None
    kinds = [words[words.index("-") + 1] for words in mounts if words[2] == number]
    return kinds[-1] if kinds and kinds[-1].startswith(_NETWORK) else None


def cache_directory() -> Path:
    """The cache directory of this project: a folder in `XDG_CACHE_HOME`, or in ~/.cache."""
    return expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache", ConfigError, "XDG_CACHE_HOME") / "flexgen-helm"
