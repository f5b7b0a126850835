"""HTTP connections of the OpenAI-compatible endpoint; one whose headers do not arrive in time is closed."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 30.0
"""Seconds from the beginning of a connection, or of its next request, until all headers are there; uvicorn has no
limit.
"""


class Connection(H11Protocol):
    """Parses requests by h11, which is strict, whichever other parsers are installed."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._stop()

    def data_received(self, data: bytes) -> None:
        """Parse data; the wait ends when the headers are complete."""
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        is_waiting: Any = self.conn.their_state is h11.IDLE
        if not is_waiting:
            self._stop()
        elif self._late is None:
            self._late = self.loop.call_later(HEADERS_S, self._give_up)

    def _give_up(self) -> None:
        self._late = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
