"""Connects to a Ray cluster, or starts one on this machine; failures become one-line errors."""

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
"""Seconds within which a port must accept a connection."""
_CONNECT_S = 15.0
"""Seconds within which a cluster whose port is open must admit this process."""
_START_S = 180.0
"""Seconds within which a cluster must start on this machine; it takes a few unless the machine is busy."""
_AGAIN_S = 60.0
"""Seconds of that which must be left for another try."""
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_AUTO_CONNECT": "0"}
"""Defaults of Ray's environment variables: no usage statistics, and no cluster is started without being asked for."""


def import_ray() -> Any:
    """Import Ray; raises `InstallationError` if it is missing."""
    try:
        import ray
    except ImportError as error:
        raise InstallationError(f"--ray needs Ray ({error}); run `pip install 'flexgen-helm[ray]'`") from None
    return ray


def check_address(address: str) -> None:
    """Raise `ConfigError` if nothing listens at `address`; takes seconds and does not import Ray."""
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
    """Join the cluster at `address`; returns the `ray` module.

    An empty address means RAY_ADDRESS, or if that is not set a cluster started on this machine with room for
    `num_workers`; "auto" is a cluster that runs on this machine; "local" starts one. Call `check_address` first. Raises
    `EngineError`.
    """
    address = _meant(address)
    _quieten()  # before the import of Ray, which reads the environment
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
    """Call `init` in a thread; raises what it raises, and `TimeoutError` if it takes longer than `seconds`.

    Ray itself waits for minutes if another program listens at the port. In a thread it leaves signal handlers alone.
    """
    found: Future[Any] = Future()

    def run() -> None:
        try:
            found.set_result(init())
        except BaseException as error:
            found.set_exception(error)
        else:
            threading.Event().wait()  # the processes of a cluster end with the thread that has started them

    threading.Thread(target=run, name="flexgen-connect", daemon=True).start()
    found.result(seconds)
