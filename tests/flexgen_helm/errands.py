"""What processes that help are told to do in tests."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any


class Odd(Exception):
    """Cannot be read again where it is written."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class Errands:
    """An object whose methods are called in another process."""

    def pid(self) -> int:
        return os.getpid()

    def says(self, *text: str) -> str:
        logging.getLogger("helm").warning("said %s", text[0])
        return " ".join(text)

    def fails(self, error: str) -> None:
        raise {"odd": lambda: Odd(1, 2), "value": lambda: ValueError("no such value")}[error]()

    def dies(self, times: int, notes: Path) -> str:
        """Ends its process so often, before it does what it is to do."""
        with notes.open("a") as file:
            file.write(".")
        if len(notes.read_text()) <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    def ignores(self) -> list[bool]:
        return [signal.getsignal(each) == signal.SIG_IGN for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


def cannot() -> Any:
    raise ValueError("it cannot be made")
