"""An argument parser whose errors are one line; imports nothing of the engine, so that `doctor` runs without it."""

from __future__ import annotations

import argparse
from typing import NoReturn

from flexgen_helm.terminal.errors import UsageError


class Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError` instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError`."""
        raise UsageError(f"{message} (see {self.prog} --help)")
