"""An OpenAI-compatible HTTP endpoint over an engine: concurrent requests share its sweeps."""

from __future__ import annotations

import asyncio
import hmac
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, aclosing
from typing import Any, TypeVar

from engine.asking.front import Front
from engine.errors import ConfigError, EngineError, InstallationError
from engine.job import Completion, Job
from engine.reading import parse_json
from flexgen_helm.adapters.openai.bodies import CHAT, COMPLETIONS, Asked, Endpoint, RefusedBody, read_body
from flexgen_helm.adapters.openai.model import Model, error_body
from flexgen_helm.adapters.openai.streaming import Chunks

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise InstallationError(f"starlette is missing ({error}); run `pip install 'flexgen-helm[serve]'`") from error

_MOST_BYTES = 64_000_000
"""Largest size of a request body, in bytes."""
_BODY_S = 120
"""Seconds within which a body must arrive."""
_ALIVE_S = 15.0
"""Seconds between the comments of a stream, which keep proxies from closing it."""
_GONE = 499
"""The status to log for a request whose client has closed the connection; it is not sent."""
_HEADERS = {408: {"Connection": "close"}, 413: {"Connection": "close"}, 429: {"Retry-After": "5"}}
"""The headers of refusals, by status. If a body was not read to its end, the connection must close, because the next
request could not be separated from it.
"""
_T = TypeVar("_T")


class Server:
    """Answers HTTP requests by jobs of an engine, with a limit on concurrent choices."""

    def __init__(self, model: Model, engine: Front, *, most_choices: int, api_key: str | None = None) -> None:
        """most_choices: the limit on choices of all requests in progress; further requests are refused with status 429.

        api_key: the bearer token that requests must have; None accepts all.
        """
        self._model, self._engine = model, engine
        self._most, self._api_key = most_choices, api_key
        self._num_choices = 0
        self._tokenizer = asyncio.Lock()

    def app(self, hosts: Sequence[str]) -> Starlette:
        """Return the application; `hosts` are the host names by which it may be called, `*` any."""
        return Starlette(
            routes=[
                Route("/health", self._health, methods=["GET"]),
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/v1/models/{name:path}", self._models, methods=["GET"]),
                Route(COMPLETIONS, self._answering(COMPLETIONS), methods=["POST"]),
                Route(CHAT, self._answering(CHAT), methods=["POST"]),
            ],
            # Otherwise a web page could let its own domain name resolve to this server, and read answers in a visitor's
            # browser.
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
            exception_handlers={HTTPException: _http_error},
        )

    async def _health(self, request: Request) -> Response:
        told = {"choices_in_progress": self._num_choices}
        try:
            await self._completions([])  # an engine that has failed raises even without jobs
        except Exception:  # the error is reported to requests with a token; this endpoint needs none
            return JSONResponse({"status": "the engine has ended; start the server again", **told}, status_code=503)
        return JSONResponse({"status": "ok", **told})

    async def _models(self, request: Request) -> Response:
        if (refused := self._unauthorized(request)) is not None:
            return refused
        window = self._model.prompts.window
        told = [
            {"id": name, "object": "model", "created": 0, "owned_by": "flexgen-helm", "max_model_len": window}
            for name in self._model.names
        ]
        if (name := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": told})
        if name not in self._model.names:
            return _refusal(RefusedBody(f"model {name!r} is not here; {self._model.names[0]!r} is", "model", 404))
        return JSONResponse(told[self._model.names.index(name)])

    def _answering(self, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            if (refused := self._unauthorized(request)) is not None:
                return refused
            with ExitStack() as entered:
                try:
                    asked = await asyncio.to_thread(_read, await _content(request), endpoint)
                    self._enter(asked.num_jobs)  # before jobs are made: a small body may ask for very many choices
                    entered.callback(self._leave, asked.num_jobs)
                    jobs = await self._locked(self._model.jobs, asked)
                    if asked.stream:
                        return _Stream(self._stream(asked, jobs), entered.pop_all().close)
                    return await self._whole(request, asked, jobs)
                except ClientDisconnect:
                    return Response(status_code=_GONE)
                except EngineError as error:
                    return _refusal(error)

        return answer

    def _unauthorized(self, request: Request) -> Response | None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if self._api_key is None or (
            kind.lower() == "bearer" and hmac.compare_digest(token.encode(), self._api_key.encode())
        ):
            return None
        refused = _refusal(RefusedBody("the bearer token is missing or another one than --api-key", None, 401))
        refused.headers["WWW-Authenticate"] = "Bearer"
        return refused

    def _enter(self, count: int) -> None:
        """Count a request's choices, or raise if there are too many."""
        if count > self._most:
            raise RefusedBody(f"{count} choices are more than --max-choices {self._most}; ask in several requests", "n")
        if self._num_choices + count > self._most:
            raise RefusedBody(f"{self._num_choices} of {self._most} choices are in progress; ask later", None, 429)
        self._num_choices += count

    async def _locked(self, work: Callable[..., _T], *args: Any) -> _T:
        """Run `work`, which tokenizes or decodes, in a thread: it may take long, and is not thread-safe."""
        await self._tokenizer.acquire()
        working = asyncio.ensure_future(asyncio.to_thread(work, *args))
        working.add_done_callback(lambda _: self._tokenizer.release())
        return await asyncio.shield(working)  # the thread goes on if its caller is cancelled

    async def _whole(self, request: Request, asked: Asked, jobs: Sequence[Job]) -> Response:
        computing = asyncio.ensure_future(self._completions(jobs))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((computing, gone), return_when=asyncio.FIRST_COMPLETED)
            if not computing.done():
                return Response(status_code=_GONE)
            return await self._locked(self._response, asked, jobs, computing.result())
        finally:
            for task in (computing, gone):
                task.cancel()  # cancels the jobs of a client that has disconnected

    def _response(self, asked: Asked, jobs: Sequence[Job], completions: Sequence[Completion]) -> Response:
        return JSONResponse(self._model.body(asked, jobs, completions, uuid.uuid4().hex))

    async def _completions(self, jobs: Sequence[Job]) -> list[Completion]:
        found: dict[int, Completion] = {}
        stream: Any = self._engine.astream(jobs)
        async with aclosing(stream):
            async for index, completion in stream:
                found[index] = completion
        return [found[index] for index in range(len(jobs))]

    async def _stream(self, asked: Asked, jobs: Sequence[Job]) -> AsyncIterator[bytes]:
        """Yield the events of a stream: each choice when it is complete, and comments in the meantime."""
        chunks = Chunks(self._model, asked, jobs, uuid.uuid4().hex)
        coming: asyncio.Queue[tuple[int, Completion] | BaseException | None] = asyncio.Queue()
        computing = asyncio.ensure_future(self._pass_on(jobs, coming))
        try:
            for chunk in chunks.beginning():
                yield _event(chunk)
            while True:
                try:
                    found = await asyncio.wait_for(coming.get(), _ALIVE_S)
                except TimeoutError:
                    yield b": in progress\n\n"
                    continue
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    break
                for event in await self._locked(_events, chunks, *found):
                    yield event
            for chunk in chunks.ending():
                yield _event(chunk)
            yield b"data: [DONE]\n\n"
        except EngineError as error:
            yield _event(error_body(error)[1])
        finally:
            computing.cancel()

    async def _pass_on(self, jobs: Sequence[Job], coming: asyncio.Queue[Any]) -> None:
        """Put (index, completion) of each job into the queue, then None; or the exception that ended the call."""
        stream: Any = self._engine.astream(jobs)
        try:
            async with aclosing(stream):
                async for found in stream:
                    coming.put_nowait(found)
            coming.put_nowait(None)
        except Exception as error:
            coming.put_nowait(error)

    def _leave(self, count: int) -> None:
        self._num_choices -= count


class _Stream(StreamingResponse):
    """A streaming response that calls `leave` when it ends, in whatever way."""

    def __init__(self, events: AsyncIterator[bytes], leave: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._leave = leave

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def _content(request: Request) -> bytes:
    """Read the request's body; raises `RefusedBody`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # pages of other sites can send only other types without a preflight request
        raise RefusedBody(f"content-type {kind!r} is not application/json", None, 415)
    content = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                content += part
                if len(content) > _MOST_BYTES:
                    raise RefusedBody(f"the body has more than {_MOST_BYTES:,} bytes", None, 413)
    except TimeoutError:
        raise RefusedBody(f"the body was not there after {_BODY_S} seconds", None, 408) from None
    return bytes(content)


def _read(content: bytes, endpoint: Endpoint) -> Asked:
    """Parse a body; raises `ConfigError`. It may be large, so this is called in a thread."""
    found = parse_json(content, "the body", ConfigError)
    try:
        json.dumps(found, allow_nan=False)
    except ValueError:
        raise RefusedBody("the body holds NaN or an infinite number, which is no JSON") from None
    return read_body(found, endpoint)


async def _gone(request: Request) -> None:
    """Return when the client has closed its connection; called after the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _events(chunks: Chunks, index: int, done: Completion) -> list[bytes]:
    return [_event(chunk) for chunk in chunks.of(index, done)]


def _event(chunk: Any) -> bytes:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode(errors="replace")


def _refusal(error: EngineError) -> Response:
    status, body = error_body(error)
    return JSONResponse(body, status_code=status, headers=_HEADERS.get(status))


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return _refusal(RefusedBody(f"{request.method} {request.url.path} is not served here", None, status))
