"""Keeps helper processes from using an engine: only the command's own process has one."""

from __future__ import annotations


class EngineElsewhere(BaseException):
    """Raised when a helper process needs an engine.

    It is no `Exception`, because HELM's annotators and metrics would turn that into an answer.
    """


class EngineGuard:
    """Allows or forbids the use of engines, and records whether one was needed even if the exception was caught."""

    def __init__(self) -> None:
        self.is_closed = False
        """Whether this process is a helper, which may not use engines."""
        self._was_asked = False

    def check(self) -> None:
        """Raise `EngineElsewhere` if this process may not use an engine."""
        if self.is_closed:
            self._was_asked = True
            raise EngineElsewhere

    def check_not_asked(self) -> None:
        """Raise `EngineElsewhere` if `check` has raised it since the last call."""
        was_asked, self._was_asked = self._was_asked, False
        if was_asked:
            raise EngineElsewhere
