"""Keeps a process that only helps another one from asking an engine, which that other one has."""

from __future__ import annotations


class EngineElsewhere(BaseException):
    """An engine was to be asked in a process that has none.

    No `Exception`: HELM's annotators and metrics make an answer of those.
    """


class EngineGuard:
    """Lets engines be asked, or not; knows whether one was to be, whatever has become of the exception."""

    def __init__(self) -> None:
        self.is_closed = False
        """Whether this process only helps another one."""
        self._was_asked = False

    def check(self) -> None:
        """Raise `EngineElsewhere` where this process is not to ask an engine."""
        if self.is_closed:
            self._was_asked = True
            raise EngineElsewhere

    def check_not_asked(self) -> None:
        """Raise `EngineElsewhere` if `check` has since the last call."""
        was_asked, self._was_asked = self._was_asked, False
        if was_asked:
            raise EngineElsewhere
