"""A sweep that all stages compute, or none of them: one that runs out of memory does not stop the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from engine.errors import one_line
from engine.memory import accelerator
from engine.stages.line import StageLine

Found = TypeVar("Found")


class LostSweepError(MemoryError):
    """A stage had no memory for a sweep; all have come to its end."""


def in_step(line: StageLine, sweep: Callable[[], Found], recover: Callable[[], None], device: torch.device) -> Found:
    """The result of this stage's part of a sweep that has begun, if no stage before it ran out of memory.

    A stage that does takes what is still to come and hands on zeros, so that the others come to the end of the sweep;
    the stage that leads may then have it computed again, in smaller parts. recover: makes ready for another sweep.
    Raises `LostSweepError`, with the first stage's reason.
    """
    found, reason = None, ""
    try:
        found = sweep()
    except Exception as error:
        if not accelerator.is_out_of_memory(error):
            raise
        reason = one_line(error)
    if found is None:  # only now is the memory of what was under way free
        recover()
        accelerator.release_memory(device)
        line.forgo()
    reason = line.settle(reason)
    if found is None or reason:
        raise LostSweepError(reason)
    return found
