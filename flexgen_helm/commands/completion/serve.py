"""`flexgen-helm serve`: an OpenAI-compatible endpoint over the engine, on this machine alone by default.

It answers completions and chat completions, with log-probabilities of prompts, and lists its model. Requests that come
together share sweeps. It ends with Ctrl-C or SIGTERM, when what is in progress is answered, or after 30 seconds.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, InstallationError
from engine.policy import Policy
from flexgen_helm.runs.flags import POLICY, add_policy_flags, policy_from_flags
from flexgen_helm.terminal.installation import model_problem
from flexgen_helm.terminal.parser import Parser
from flexgen_helm.workers.engine_processes import engine_processes

EXAMPLES = (
    "flexgen-helm serve --model facebook/opt-30b --policy opt-30b-t4",
    "flexgen-helm serve --model ./my-model --gpu-memory 16GB --port 9000 --served-model-name mine",
)
_ENDS_AFTER_S = 30
_OTHERS = 100
"""Connections in addition to requests in progress: idle ones, and refused ones."""
_STALLED_MS = 60_000
"""A client that takes nothing of what it is sent is dropped after so long."""
_KEY = "FLEXGEN_HELM_API_KEY"


def serve_parser() -> Parser:
    """The command line of `flexgen-helm serve`."""
    parser = Parser(
        prog="flexgen-helm serve",
        description=__doc__,
        examples=EXAMPLES,
        texts=["served_model_name", "api_key", "host"],
    )
    model = parser.group("model")
    model.add_argument("--model", required=True, help="hub id, directory or GGUF file of the model")
    model.add_argument("--served-model-name", metavar="NAME", help="name of the model in requests (default: --model)")
    endpoint = parser.group("endpoint")
    endpoint.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    endpoint.add_argument(
        "--port", type=int, default=8000, help="port to listen on; 0 uses a free one and prints it (default: 8000)"
    )
    endpoint.add_argument(
        "--api-key",
        metavar="TOKEN",
        help=f"bearer token of requests, required for addresses other than loopback (default: ${_KEY})",
    )
    endpoint.add_argument(
        "--max-choices",
        type=int,
        default=2000,
        metavar="N",
        help="most choices in progress; further requests get status 429 (default: 2000)",
    )
    add_policy_flags(parser.group("policy", POLICY))
    parser.group("output").add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def serve(arguments: Sequence[str]) -> int:
    """Serve until a signal comes; `EngineError` for bad input."""
    args = serve_parser().parse_args(arguments)
    spec = policy_from_flags(args)
    policy = Policy.load("auto" if spec is None else spec)
    if args.max_choices < 1:
        raise ConfigError(f"--max-choices {args.max_choices} is below 1")
    api_key = _api_key(args.api_key)
    hosts = _hosts(args.host, api_key)
    try:
        import uvicorn

        from flexgen_helm.adapters.openai.connections import Connection
        from flexgen_helm.adapters.openai.server import Server
    except ImportError as error:
        raise InstallationError(f"uvicorn is missing ({error}); run `pip install 'flexgen-helm[serve]'`") from error
    with _listening(args.host, args.port) as listener:
        engine_processes.prepare()
        if problem := model_problem():
            raise InstallationError(problem)
        from engine.checkpoint.description import describe
        from engine.checkpoint.tokenizer import load_tokenizer
        from engine.text.prompt import PromptTokenizer
        from flexgen_helm.adapters.openai.model import Model, names_of

        description = describe(args.model)
        tokenizer = PromptTokenizer.of(load_tokenizer(Path(description.path)), description.window)
        model = Model.of(names_of(args.model, args.served_model_name), tokenizer, description.vocab_size)
        with engine_processes.load(args.model, policy) as engine:
            server = Server(model, engine, most_choices=args.max_choices, api_key=api_key)
            config = uvicorn.Config(
                server.app(hosts),
                http=Connection,
                ws="none",
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=_ENDS_AFTER_S,
                limit_concurrency=args.max_choices + _OTHERS,
            )
            address, port = listener.getsockname()[:2]
            print(f"{model.names[0]} is served at http://{_bracketed(address)}:{port}/v1", flush=True)
            asyncio.run(_serve(uvicorn.Server(config), listener))
    return 0


async def _serve(server: Any, listener: socket.socket) -> None:
    """Serve until a signal comes; a second one ends what is in progress."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.handle_exit, signal.SIGINT, None)
    server.capture_signals = nullcontext  # its own handlers would raise the signal again at the end
    await server.serve(sockets=[listener])


def _api_key(flag: str | None) -> str | None:
    """The token that requests must bring; None where there is none. `ConfigError` for one that no header carries."""
    name, key = ("--api-key", flag) if flag is not None else (_KEY, os.environ.get(_KEY))
    if key == "":
        raise ConfigError(f"{name} is empty; give a token, or leave it out")
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{name} has a space, or a character outside ASCII, which headers do not carry; give another")
    return key


def _hosts(host: str, api_key: str | None) -> list[str]:
    """Names by which the server may be called; `ConfigError` where others reach it and need no token."""
    try:
        is_here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = False
    if is_here:
        return ["localhost", "127.0.0.1", "::1", "[::1]", host]
    if api_key is None:
        raise ConfigError(f"--host {host} lets others in; give an --api-key or {_KEY}, or leave --host out")
    return ["*"]


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens; `ConfigError` where it cannot, before anything is loaded."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port {port} is not from 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_MS)  # its connections have it, too
        return listener
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror  # Python adds to it
        hint = "give another --port" if error.errno == errno.EADDRINUSE else "give another --host or --port"
        raise ConfigError(f"{host}, port {port}, cannot be listened at: {reason}; {hint}") from None


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
