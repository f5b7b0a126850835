"""Protects: connections that do not come to the point are closed, and requests are read strictly."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from flexgen_helm.adapters.openai import connections
from flexgen_helm.adapters.openai.connections import Connection

REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


async def answered(app: Any, *parts: bytes) -> bytes:
    """What a server that is sent these parts answers until it closes the connection."""
    config = Config(app, http=Connection, ws="none", lifespan="off", log_level="critical", timeout_keep_alive=60)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(config, ServerState(), {}), "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        try:
            return await asyncio.wait_for(reader.read(), 60)
        finally:
            writer.close()
            await writer.wait_closed()


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the path."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"7")]})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


@pytest.mark.parametrize("begun", [b"", REQUEST, REQUEST + b"X-More: "], ids=["nothing", "a line", "half a line"])
def test_a_request_whose_headers_do_not_come_is_not_waited_for(begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADERS_S", 0.2)
    assert asyncio.run(answered(app, begun)) == b""


def test_neither_is_a_second_one_on_the_same_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADERS_S", 0.2)
    found = asyncio.run(answered(app, REQUEST + b"\r\n", REQUEST))
    assert found.startswith(b"HTTP/1.1 200 OK\r\n")
    assert found.count(b"/health") == 1


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: +5\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Host: other\r\n",
    ],
    ids=["two lengths", "a signed length", "another coding", "a space", "two hosts"],
)
def test_requests_that_two_readers_might_take_for_different_ones_are_refused(headers: bytes) -> None:
    found = asyncio.run(answered(app, REQUEST.replace(b"GET", b"POST") + headers + b"\r\n"))
    assert b" 200 " not in found
    assert found.startswith(b"HTTP/1.1 4") or found.startswith(b"HTTP/1.1 501")
