"""The control groups (versions 1 and 2) of this process, from the kernel's own files. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
"""The root of the file tree that contains proc and the paths it names."""


def group_directories(controller: str, root: Path = ROOT) -> Iterator[tuple[int, Path]]:
    """The version (1 or 2) and directory of every group whose limits on `controller` apply to this process.

    These are its own group and all groups around it that are mounted: a container, a batch system or systemd may set a
    limit at any level. Where the group is in no mounted part, as it may appear in a container, the top of the mounted
    part counts as one of them; a part for other groups does not, if another one holds ours.
    """
    mounts = list(_mounts(read_text(root / "proc/self/mountinfo")))
    for line in read_text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        version = 2 if number == "0" and not names else 1
        if version == 1 and controller not in names.split(","):
            continue
        places = [
            (_below(mount_root, path), root / point.lstrip("/"))
            for mounted_version, options, mount_root, point in mounts
            if mounted_version == version and (version == 2 or controller in options)
        ]
        holding = [(parts, top) for parts, top in places if parts is not None]
        for parts, top in holding or places:
            for directory in _upwards(top, parts or []):
                yield version, directory


def read_text(path: Path) -> str:
    """The content of a file; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def read_number(path: Path) -> int | None:
    """The integer in a file; None where there is none, as in a file that says "max"."""
    try:
        return int(read_text(path))
    except ValueError:
        return None


def read_fields(path: Path) -> dict[str, int]:
    """The numbers in a file of lines `name number`; unreadable lines are left out."""
    pairs = (line.split() for line in read_text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) >= 2 and pair[1].isdecimal()}


def _mounts(text: str) -> Iterator[tuple[int, frozenset[str], str, str]]:
    """Version, options (the controllers), mounted part and place of each mount in a `mountinfo` file."""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, of_system = before.split(), after.split()
        if len(fields) >= 5 and len(of_system) >= 3 and of_system[0] in ("cgroup", "cgroup2"):
            version = 2 if of_system[0] == "cgroup2" else 1
            yield version, frozenset(of_system[2].split(",")), _unescaped(fields[3]), _unescaped(fields[4])


def _unescaped(name: str) -> str:
    """A path of `mountinfo` with its octal escapes decoded."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)


def _below(mount_root: str, path: str) -> list[str] | None:
    """The parts of a group's path below the mount; None where it is elsewhere."""
    parts, top = ([part for part in name.split("/") if part] for name in (path, mount_root))
    if parts[: len(top)] != top or ".." in parts:
        return None
    return parts[len(top) :]


def _upwards(top: Path, parts: list[str]) -> Iterator[Path]:
    for count in range(len(parts), -1, -1):
        yield top.joinpath(*parts[:count])
