"""Reaching a Ray cluster, or starting one on this machine: in one line where that fails."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from collections.abc import Callable
from typing import Any

from engine.errors import ConfigError, EngineError, InstallationError, one_line

_ANSWER_S = 5.0
"""For a port to answer."""
_CONNECT_S = 15.0
"""For a cluster whose port answers to take this process in."""
_OFF = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
"""What a local cluster is started with, unless the user's environment says otherwise."""


def import_ray() -> Any:
    """The package; raises `InstallationError` where it is missing."""
    try:
        import ray
    except ImportError as error:
        raise InstallationError(f"--ray needs Ray ({error}); run `pip install 'flexgen-helm[ray]'`") from None
    return ray


def connect(address: str, num_workers: int | None) -> Any:
    """Be part of the cluster at `address`; returns ray.

    An empty address is that of RAY_ADDRESS, or else a cluster that is started on this machine with room for
    `num_workers`; "auto" is one that runs on this machine; "local" starts one. Raises `EngineError`.
    """
    address = address or os.environ.get("RAY_ADDRESS", "") or "local"
    if address.startswith("ray://"):
        raise ConfigError(
            f"--ray {address}: Ray's client is not used; run this command on a machine of the cluster with --ray auto"
        )
    ray = import_ray()
    if ray.is_initialized():
        return ray
    _quieten()
    if address == "local":
        _start(ray, num_workers)
    else:
        if address != "auto":
            _check_answers(address)
        _within(_CONNECT_S, lambda: ray.init(address=address, **_SETTINGS), address)
    return ray


_SETTINGS: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}


def _quieten() -> None:
    for name, value in _OFF.items():
        os.environ.setdefault(name, value)


def _start(ray: Any, num_workers: int | None) -> None:
    cores = os.cpu_count() or 1
    try:
        ray.init(address="local", num_cpus=max(cores, num_workers or 1), include_dashboard=False, **_SETTINGS)
    except Exception as error:
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


def _within(seconds: float, init: Callable[[], Any], address: str) -> None:
    """Call `init`, but give up waiting: Ray waits for minutes at a port where something else listens."""
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            init()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="flexgen-connect", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise ConfigError(f"--ray {address}: no Ray cluster has answered within {_ANSWER_S + seconds:.0f} s")
    error = outcome[0]
    if error is None:
        return
    if "ersion mismatch" in str(error):
        raise InstallationError(
            f"--ray {address}: {one_line(error)}; install the same Python and Ray on all machines"
        ) from None
    raise ConfigError(f"--ray {address}: {one_line(error)}") from None
