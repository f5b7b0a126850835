"""Connects processes that compute together, by torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as distributed

from engine.errors import EngineError, one_line
from engine.memory import accelerator


def meet(address: str, index: int, count: int, device: torch.device, timeout: timedelta) -> None:
    """Join torch.distributed as process `index` of `count`; returns when all have joined.

    address: path of a file, absent at first, that all can open, or `tcp://host:port`, at which the first process
    listens. timeout: how long one process waits for another, here and later. Raises `EngineError` if they do not come.
    """
    os.environ.update(accelerator.GATHERING)
    on_cuda = device.type == "cuda"
    try:
        with accelerator.on_device(device) if on_cuda else nullcontext():
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
                init_method=address if "://" in address else Path(address).absolute().as_uri(),
                rank=index,
                world_size=count,
                timeout=timeout,
                device_id=device if on_cuda else None,
            )
    except (RuntimeError, ValueError) as error:
        raise EngineError(
            f"engine {index} of {count} cannot meet the others through {address}: {one_line(error)}; start all of them "
            "again"
        ) from error


@contextmanager
def naming_the_lost(told: str) -> Iterator[None]:
    """Within the context, the end of another process raises an `EngineError` that begins with `told`."""
    try:
        yield
    except RuntimeError as error:
        raise EngineError(f"{told} has ended: {one_line(error)}; start all of them again") from error


def part() -> None:
    """Leave, after all processes have agreed to."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
