"""Reaching a Ray cluster, or starting one on this machine: in one line where that fails."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from engine.errors import ConfigError, EngineError, InstallationError, one_line

_ANSWER_S = 5.0
"""For a port to answer."""
_CONNECT_S = 15.0
"""For a cluster whose port answers to take this process in."""
_START_S = 180.0
"""For a cluster to be started here, which takes seconds where the machine is not busy."""
_AGAIN_S = 60.0
"""Of that, what must be left for another try."""
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_AUTO_CONNECT": "0"}
"""No statistics are sent, and no cluster is started unasked, unless the user's environment says otherwise."""


def import_ray() -> Any:
    """The package; raises `InstallationError` where it is missing."""
    try:
        import ray
    except ImportError as error:
        raise InstallationError(f"--ray needs Ray ({error}); run `pip install 'flexgen-helm[ray]'`") from None
    return ray


def check_address(address: str) -> None:
    """Raise `ConfigError` where nothing answers at `address`, within seconds and without Ray."""
    address = _meant(address)
    if address.startswith("ray://"):
        raise ConfigError(
            f"--ray {address}: Ray's client is not used; run this command on a machine of the cluster with --ray auto"
        )
    if address not in ("auto", "local"):
        _check_answers(address)


def _meant(address: str) -> str:
    return address or os.environ.get("RAY_ADDRESS", "") or "local"


def connect(address: str, num_workers: int | None) -> Any:
    """Be part of the cluster at `address`; returns ray.

    An empty address is that of RAY_ADDRESS, or else a cluster that is started on this machine with room for
    `num_workers`; "auto" is one that runs on this machine; "local" starts one. `check_address` was asked before.
    Raises `EngineError`.
    """
    address = _meant(address)
    _quieten()  # before Ray is imported, which reads it then
    ray = import_ray()
    if ray.is_initialized():
        return ray
    if address == "local":
        _start(ray, num_workers)
    else:
        _join(ray, address)
    return ray


_SETTINGS: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}


def _quieten() -> None:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def _join(ray: Any, address: str) -> None:
    try:
        _within(_CONNECT_S, lambda: ray.init(address=address, **_SETTINGS))
    except TimeoutError:
        within = f"{_ANSWER_S + _CONNECT_S:.0f} s"
        # Ray sends its token to clusters that it finds by itself, but to no address that was given.
        raise ConfigError(
            f"--ray {address}: no Ray cluster has let this command in within {within}; one that asks for a token "
            "(`ray start` does where ~/.ray/auth_token is) needs RAY_AUTH_MODE=token"
        ) from None
    except Exception as error:
        line = one_line(error)
        if "ersion mismatch" in line:
            raise InstallationError(f"--ray {address}: {line}; install the same Python and Ray everywhere") from None
        raise ConfigError(f"--ray {address}: {line}") from None


def _start(ray: Any, num_workers: int | None) -> None:
    cores = max(os.cpu_count() or 1, num_workers or 1)
    until = time.monotonic() + _START_S
    while True:
        left_s = until - time.monotonic()
        try:
            _within(left_s, lambda: ray.init(address="local", num_cpus=cores, include_dashboard=False, **_SETTINGS))
            return
        except Exception as error:
            # Ray gives a busy machine half a minute; what it has begun by then ends with the thread that began it.
            if "timed out during startup" not in str(error) or time.monotonic() > until - _AGAIN_S:
                raise EngineError(f"a Ray cluster cannot be started on this machine: {one_line(error)}") from error


def _check_answers(address: str) -> None:
    found = re.fullmatch(r"\[?([^\s\]]+)\]?:(\d+)", address)
    if found is None:
        raise ConfigError(
            f"--ray {address}: give host:port of a cluster's head, as `ray start --head` says it, or auto"
        )
    try:
        socket.create_connection((found[1], int(found[2])), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or one_line(error)
        raise ConfigError(
            f"--ray {address}: nothing answers there ({why}); is the cluster up, and is this machine in its network?"
        ) from None


def _within(seconds: float, init: Callable[[], Any]) -> None:
    """Call `init`, raise what it raises, and `TimeoutError` where it takes longer.

    Ray waits for minutes at a port where something else listens. In a thread it leaves the signals' handlers alone.
    """
    found: Future[Any] = Future()

    def run() -> None:
        try:
            found.set_result(init())
        except BaseException as error:
            found.set_exception(error)
        else:
            threading.Event().wait()  # a cluster's processes end with the thread that has started them

    threading.Thread(target=run, name="flexgen-connect", daemon=True).start()
    found.result(seconds)
