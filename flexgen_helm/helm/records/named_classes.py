"""Classes that the files of a run name: HELM makes an object of whatever stands there, a function's call included."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from engine.errors import ConfigError, named, shown


def named_class(name: str, kind: type[Any]) -> type[Any]:
    """The class of this kind that `name` stands for.

    Raises `ConfigError` for a name of anything else, and for one outside HELM and its installed plugins whose module is
    not imported yet: importing would run code that the files alone have chosen.
    """
    module, _, last = name.rpartition(".")
    if module not in sys.modules and name.partition(".")[0] not in _packages():
        raise ConfigError(
            f"the class {shown(name)} is named, whose code would be run and which is neither HELM's nor an installed "
            "plugin's"
        )
    try:
        found = getattr(sys.modules.get(module) or importlib.import_module(module), last)
    except Exception as error:  # whatever its module does, or lacks
        raise ConfigError(f"the class {shown(name)} cannot be imported: {named(error)}") from None
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ConfigError(f"{shown(name)} is named where a {kind.__name__} is expected, and is none")
    return found


@cache
def _packages() -> frozenset[str]:
    """HELM's, and those that its plugins are in."""
    return frozenset({"helm", "flexgen_helm", *(each.module.partition(".")[0] for each in entry_points(group="helm"))})
