"""The program of a worker process whose engine has faults: a prompt that begins with one of these tokens has it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch

from engine import Engine, Policy, worker
from engine.errors import CheckpointError
from engine.executor import Executor

KILLS, RAISES, RUNS_OUT, SLOW, FAILS_ON_SECOND, WORDLESS, MUTE = 401, 402, 403, 404, 405, 406, 407


def no_memory(*_: Any) -> Any:
    """As under a limit of memory that is reached."""
    raise MemoryError


def no_files(_: Engine) -> None:
    """As where weights cannot be read."""
    raise CheckpointError("the weights cannot be read")


def main(line: int) -> None:
    """As `engine.worker.main`."""
    torch.set_num_threads(1)
    sweep = Executor._swept
    num_failures = 0
    opening = Engine.from_pretrained
    device = ""

    def opened(model: str, policy: Policy, **others: Any) -> Engine:
        nonlocal device
        device = str(policy.device)
        if device.startswith(os.environ.get("FLEXGEN_TEST_CANNOT_OPEN", "nothing")):
            raise RuntimeError("CUDA error: device unavailable")
        return opening(model, policy, **others)

    def faulty(self: Any, batches: Any) -> Any:
        nonlocal num_failures
        first = {segment.span.tokens[0] for batch in batches for segment in batch}
        first |= {span.tokens[0] for batch in batches for segment in batch for span in segment.span.chain}
        if KILLS in first:
            os.kill(os.getpid(), signal.SIGKILL)
        if WORDLESS in first:
            worker.carried = no_memory  # type: ignore[assignment]
        if MUTE in first:
            worker.Connection.send = no_memory  # type: ignore[method-assign]
        if first & {RAISES, WORDLESS, MUTE}:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if FAILS_ON_SECOND in first and device == "cpu:1":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if RUNS_OUT in first and num_failures < 2:
            num_failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if SLOW in first:
            time.sleep(0.2)
        return sweep(self, batches)

    if "FLEXGEN_TEST_CANNOT_LOAD" in os.environ:
        Engine.wait_until_loaded = no_files  # type: ignore[method-assign]
    Engine.from_pretrained = opened  # type: ignore[method-assign,assignment]
    Executor._swept = faulty  # type: ignore[method-assign]
    worker.main(line)
