"""Rows of a sweep's groups, brought to the device from the tiers where they are stored, ahead of their turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch

from engine.cache.tables import Tables
from engine.cache.transfer import KVTransfer
from engine.memory.disk.rows import DiskRows, Fetch
from engine.memory.tiers import Tier
from engine.planning.limits import STAGING_BUFFERS


class Stored(Protocol):
    """A group of spans whose rows are on one tier."""

    @property
    def tier(self) -> Tier | None:
        """That tier; None where they are stored nowhere."""


G = TypeVar("G", bound=Stored)


class Ahead(Generic[G]):
    """Fetches the rows of one group after another, in the order of the sweep, while those before are in use."""

    def __init__(
        self,
        room: Tables,
        transfer: KVTransfer,
        disk: DiskRows,
        device: torch.device,
        runs: Callable[[G], list[tuple[int, int]]],
        *,
        from_host: bool,
    ) -> None:
        """runs: the rows of a table that are a group's, as (first, count). from_host: whether to fetch those, too."""
        self._room, self._transfer, self._disk, self._device = room, transfer, disk, device
        self._runs = runs
        self._from_host = from_host
        self._coming: Iterator[tuple[int, G]] = iter(())
        self._under_way: deque[tuple[int, G, tuple[torch.Tensor, Any] | Fetch]] = deque()
        """Table and group whose rows are being fetched: from the host with the event of arrival, or from disk."""

    def brings(self, group: G) -> bool:
        """Whether the rows of a group are brought to the device in advance."""
        return group.tier == "disk" or (self._from_host and group.tier == "host")

    def begin(self, coming: Iterable[tuple[int, G]]) -> None:
        """Begin to fetch for these tables and groups; they must be taken in this order."""
        self._coming = iter(coming)
        self._under_way.clear()
        for _ in range(STAGING_BUFFERS - 1):
            self._fetch_next()

    def take(self, table: int, group: G) -> torch.Tensor:
        """The rows of the group whose turn it is, on the device.

        They are valid until the next one's are taken: what is fetched lands in the same memory again.
        """
        of_table, of_group, fetched = self._under_way.popleft()
        assert of_table == table
        assert of_group is group
        if isinstance(fetched, Fetch):
            rows = self._room.as_stored(fetched.rows(), "disk")
            rows = rows.to(self._device, non_blocking=self._transfer.is_asynchronous)
        else:
            rows, arrival = fetched
            self._transfer.await_arrival(arrival)
        self._fetch_next()
        return rows

    def stored(self, table: int, group: G) -> list[torch.Tensor]:
        """The rows of a group on the host, where they are, run by run."""
        rows = self._room.by_tier["host"][table]
        return [rows[first : first + count] for first, count in self._runs(group)]

    def _fetch_next(self) -> None:
        following = next(self._coming, None)
        if following is None:
            return
        table, group = following
        if group.tier == "disk":
            self._under_way.append((table, group, self._disk.fetch(table, self._runs(group))))
        else:
            self._under_way.append((table, group, self._transfer.fetch(self.stored(table, group))))
