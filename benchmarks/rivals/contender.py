"""What the rivals' scripts have in common: flags, the GPU memory limit, and the result line.

A contender is a process of its own: it may print anything, and last a line `result {JSON}`.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engine.memory import accelerator
from engine.reading import parse_bytes
from flexgen_helm.planning.dummy import shape_config
from flexgen_helm.planning.roofline import Workload

MARK = "result "


@dataclass(frozen=True, kw_only=True)
class Task:
    """The task of every contender."""

    shape: str
    load: Workload
    gpu_memory: int | None
    """Bytes that torch may reserve."""
    batch_size: int | None
    """Sequences in a batch; None: as many as fit by the script's own estimate."""
    cut: int | None
    """Decode steps that are measured, with the others projected by their mean; None: all are measured."""
    batches: int | None
    """Batches that are measured, with the others projected; None: all are measured."""

    @property
    def prompts(self) -> list[list[int]]:
        """The whole prompts: no rival shares prefixes."""
        return self.load.prompts(shape_config(self.shape)["vocab_size"])

    @property
    def length(self) -> int:
        """Tokens of a prompt."""
        return self.load.shared + self.load.own


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that every contender has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--shape", default="opt-30b")
    made.add_argument("--row", type=Workload.parse, default="1x64x0+512:32")
    made.add_argument("--gpu-memory")
    made.add_argument("--batch-size", type=int)
    made.add_argument("--cut", type=int, help="measure only this many decode steps, project the others")
    made.add_argument("--batches", type=int, help="measure only this many batches, project the others")
    return made


def limit_device(limit: int | None) -> None:
    """Limit the bytes that torch may reserve on the GPU."""
    if limit is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), 0)


def task_of(options: argparse.Namespace, *, enforce: bool = True) -> Task:
    """Parse the flags into a task; with `enforce`, limit what torch may reserve on the GPU."""
    limit = None if options.gpu_memory is None else parse_bytes(options.gpu_memory, "--gpu-memory")
    if enforce:
        limit_device(limit)
    return Task(
        shape=options.shape,
        load=options.row,
        gpu_memory=limit,
        batch_size=options.batch_size,
        cut=options.cut,
        batches=options.batches,
    )


def device() -> torch.device:
    """The device on which contenders compute."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def release() -> None:
    """Release memory that torch holds for freed tensors."""
    gc.collect()
    accelerator.release_memory(device())


def stopwatch(call: Callable[[], object]) -> float:
    """Seconds until the device has done everything that `call` started."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def finish(task: Task, seconds: float, *, projected: bool, **detail: Any) -> None:
    """Print the result line."""
    result = {
        "row": str(task.load),
        "seconds": seconds,
        "projected": projected,
        "requests_s": task.load.num_requests / seconds,
        "new_tokens_s": task.load.num_requests * task.load.new / seconds,
        "device_reserved_bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0,
        **detail,
    }
    print(MARK + json.dumps(result), flush=True)
