"""Runs an engine's sweeps in step with the other members of its group, if it has one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from engine.errors import EngineError
from engine.weights.members.group import Group

IDLE_S = 0.02
"""Seconds between an idle member's checks whether the others have work."""
_WAITED_FOR_S = 0.05
"""Seconds that members with work wait for those without: jobs of one caller for all members do not arrive at the same
moment, and would otherwise take two sweeps. A member that had no work then is waited for again only once it had some.
"""

Batch = TypeVar("Batch")
"""The work of a sweep, which may be empty."""
Answer = TypeVar("Answer")
"""The result of a sweep for one of its rows."""


class Lockstep(Generic[Batch, Answer]):
    """Computes sweeps when all members of a group are ready; without a group, at once."""

    def __init__(
        self, sweep: Callable[[list[Batch]], list[Answer]], recover: Callable[[], None], group: Group | None
    ) -> None:
        """sweep: computes one; recover: resets after an error, so that another sweep can begin."""
        self._sweep, self._recover = sweep, recover
        self._group = group
        self._is_sweeping = False
        self._has_left = group is None
        self._has_waited = False
        """Whether members have waited for others that still have no work."""
        self._is_waited_for = False

    @property
    def idle_s(self) -> float | None:
        """How many seconds this engine may be idle before it takes part in the others' sweeps; None without a group."""
        if self._group is None:
            return None
        return _WAITED_FOR_S if self._is_waited_for else IDLE_S

    def sweep(self, batches: list[Batch]) -> list[Answer]:
        """Return the answers of a sweep; without work, take part in a sweep of the others if they have work.

        Raises `EngineError` if a member has ended.
        """
        if self._group is not None:
            num_ready = self._agree(self._group, batches)
            are_some = 0 < num_ready < self._group.count
            is_early = are_some and not self._has_waited
            self._has_waited = are_some
            self._is_waited_for = is_early and not batches
            if num_ready == 0 or self._is_waited_for:
                return []
            if is_early:
                self._has_waited = self._agree(self._group, batches) < self._group.count
        elif not batches:
            return []
        self._is_sweeping = True
        answers = self._sweep(batches)
        self._is_sweeping = False
        return answers

    def _agree(self, group: Group, batches: list[Batch]) -> int:
        """Return the number of members with work; raises `EngineError` if one has ended."""
        agreed = group.agree(sweep=bool(batches))
        if agreed.leave:
            self._has_left = True
            raise EngineError("another engine of those that share the weights has ended; start all of them again")
        return agreed.sweep

    def recover(self) -> None:
        """Reset to a state in which the next sweep can begin, after one that ended in an error."""
        self._recover()
        self._is_sweeping = False

    def leave(self) -> None:
        """Tell the other members that this one ends; they end too.

        Members in the middle of a sweep cannot be told: they wait for layers until this process ends.
        """
        if self._group is not None and not self._has_left and not self._is_sweeping:
            self._has_left = True
            with suppress(EngineError):
                self._group.agree(sweep=False, leave=True)
