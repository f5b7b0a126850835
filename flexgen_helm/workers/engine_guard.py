"""Keeps a helper process from using an engine, which only the process that it helps has."""

from __future__ import annotations


class EngineElsewhere(BaseException):
    """An engine was needed in a process that has none.

    Not an `Exception`, since HELM's annotators and metrics turn those into answers.
    """


class EngineGuard:
    """Allows or forbids the use of engines; knows whether one was needed, even if the exception was caught."""

    def __init__(self) -> None:
        self.is_closed = False
        """Whether this process only helps another one."""
        self._was_asked = False

    def check(self) -> None:
        """Raise `EngineElsewhere` where this process may not use an engine."""
        if self.is_closed:
            self._was_asked = True
            raise EngineElsewhere

    def check_not_asked(self) -> None:
        """Raise `EngineElsewhere` if `check` has raised it since the last call."""
        was_asked, self._was_asked = self._was_asked, False
        if was_asked:
            raise EngineElsewhere
