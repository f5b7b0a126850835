"""Runs HELM evaluations on the offloading engine: HELM client, runner, plugin and command line.

Importing this package is cheap: it imports neither HELM nor torch.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"


def engine_problem() -> str | None:
    """A one-line problem with its remedy, when `import engine` finds another distribution's package; else None."""
    try:
        engine = importlib.import_module("engine")
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return f"`import engine` fails ({reason}); run `pip install --force-reinstall flexgen-helm`"
    if getattr(engine, "__distribution__", None) == "flexgen-helm":
        return None
    where = getattr(engine, "__file__", None) or next(iter(getattr(engine, "__path__", [])), "an unknown place")
    return (
        f"`import engine` finds {where}, which is another distribution's and not flexgen-helm's; "
        "uninstall that package, or run from a directory that has no `engine` of its own"
    )


def require_engine() -> None:
    """Raise `ImportError` with the line of `engine_problem`.

    `engine.errors.InstallationError` cannot say it: it lives in the package that is missing.
    """
    if problem := engine_problem():
        raise ImportError(problem)
