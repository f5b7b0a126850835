"""The names of devices in a policy: one, several of one type, or a word for all of a machine's (pure)."""

from __future__ import annotations

import re
from typing import Any

from engine.errors import ConfigError, shown

_ONE = re.compile(r"auto|all|cpu(:\d{1,6})?|mps|cuda(:\d{1,6})?|xpu(:\d{1,6})?")
_ONE_OF_SEVERAL = re.compile(r"(cpu|cuda|xpu):(\d{1,6})")


def parse_device(value: Any, where: str) -> str | tuple[str, ...]:
    """Parse a policy's `device`: a name, or a list of several; raises `ConfigError` for anything else."""
    if isinstance(value, list | tuple):
        return _several(value, where)
    if not isinstance(value, str) or not _ONE.fullmatch(value):
        raise ConfigError(
            f"{where} {shown(value)} is none of auto, all, cpu, cuda, cuda:N, mps, xpu, xpu:N, and no list such as "
            "[cuda:0, cuda:1]"
        )
    return value


def kind_of(name: str) -> str:
    """The type of a named device: "cuda" of "cuda:1"."""
    return name.partition(":")[0]


def _several(values: list[Any] | tuple[Any, ...], where: str) -> str | tuple[str, ...]:
    names: list[str] = []
    for each in values:
        match = _ONE_OF_SEVERAL.fullmatch(each) if isinstance(each, str) else None
        if match is None:
            raise ConfigError(
                f"{where}: {shown(each)} is no device of a list; write kind and number, as in [cuda:0, cuda:1]"
            )
        names.append(f"{match[1]}:{int(match[2])}")
    if not names:
        raise ConfigError(f"{where}: the list names no device")
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise ConfigError(f"{where}: {twice} is in the list {names.count(twice)} times; name each device once")
    kinds = list(dict.fromkeys(map(kind_of, names)))
    if len(kinds) > 1:
        raise ConfigError(f"{where}: {' and '.join(kinds)} do not run one model together; name devices of one kind")
    return names[0] if len(names) == 1 else tuple(names)


def check_stages(
    stages: Any, device: str | tuple[str, ...], gathers: bool | None, draft_model: str | None, where: str
) -> None:
    """Raise `ConfigError` where a policy's `stages` are no number, or do not go with what else it says of devices."""
    if not isinstance(stages, int) or isinstance(stages, bool) or not 1 <= stages < 1 << 15:
        raise ConfigError(f"{where}: stages {shown(stages)} is not a whole number of at least 1")
    if stages == 1:
        return
    what = f"{where}: stages {stages}"
    if isinstance(device, str) and device not in ("auto", "all"):
        raise ConfigError(f"{what}: device {device} is one, and each stage has its own; list as many devices")
    if not isinstance(device, str) and len(device) != stages:
        raise ConfigError(f"{what}: each has a device of its own, and device lists {len(device)}")
    if gathers:
        raise ConfigError(f"{what}: a stage has its layers alone, with nothing to gather; leave out gather-weights")
    if draft_model is not None:
        raise ConfigError(f"{what}: no draft model drafts for stages; leave out draft-model, or set stages: 1")
