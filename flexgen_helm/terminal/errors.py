"""Errors that end a command, next to `engine.errors`; imports nothing, so that `doctor` runs without the engine."""


class UsageError(Exception):
    """A command line that cannot be meant, or an installation that cannot run it; one line."""


class RunFailed(Exception):
    """A run was started and did not end well; one line."""
