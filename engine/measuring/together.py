"""Measures the links of all like devices used at once, and the rate of a gather among them, with one process each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as distributed

from engine.errors import EngineError
from engine.memory import accelerator
from engine.memory.arena import Arena
from engine.memory.shared import SharedMemory

_RUNS = 5
_LIMIT_S = 120


def rates_together(devices: Sequence[str], num_bytes: int) -> tuple[float, float]:
    """The bytes per second of the slowest device's link while all copy the same host memory, and of gathering.

    num_bytes: of the host memory, and of the gathered data, of which each device has a part. Raises `EngineError` where
    the processes cannot measure.
    """
    num_bytes -= num_bytes % (len(devices) * 4096)
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **accelerator.GATHERING, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    handle = os.memfd_create("flexgen-rates")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", "engine.measuring.together", device]
                + [str(each) for each in (index, len(devices), f"{folder}/meeting", handle, num_bytes)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[handle],
                env=environment,
                text=True,
            )
            for index, device in enumerate(devices)
        ]
        try:
            told = [process.communicate(timeout=_LIMIT_S) for process in processes]
        except subprocess.TimeoutExpired:
            raise EngineError(f"{len(devices)} devices did not measure together in {_LIMIT_S} s") from None
        finally:
            os.close(handle)
            for process in processes:
                process.kill()
                process.wait()
    for process, (_, errors) in zip(processes, told, strict=True):
        if process.returncode:
            reason = errors.strip().rpartition("\n")[2] or f"exit code {process.returncode}"
            raise EngineError(f"{len(devices)} devices cannot measure together: {reason}")
    link, gather = json.loads(told[0][0].strip().rpartition("\n")[2])
    return float(link), float(gather)


def _main(device_name: str, index: int, count: int, meeting: str, handle: int, num_bytes: int) -> None:
    device = torch.device(device_name)
    accelerator.make_current(device)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        init_method=Path(meeting).as_uri(),
        rank=index,
        world_size=count,
        timeout=timedelta(seconds=_LIMIT_S),
    )
    arena, shared = Arena(device), SharedMemory(handle, num_bytes)
    host, whole = arena.shared(shared.claim(0, num_bytes), "host"), arena.empty(num_bytes, "device")
    part = num_bytes // count
    own = whole[index * part : (index + 1) * part]
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor

    def slowest(call: Callable[[], object], size: int) -> float:
        call()  # connections are made
        accelerator.synchronize(device)
        distributed.all_reduce(torch.zeros(1))  # all begin
        start = time.perf_counter()
        for _ in range(_RUNS):
            call()
        accelerator.synchronize(device)
        rate = torch.tensor([_RUNS * size / (time.perf_counter() - start)], dtype=torch.float64)
        distributed.all_reduce(rate, distributed.ReduceOp.MIN)
        return float(rate)

    link = slowest(lambda: whole.copy_(host, non_blocking=True), num_bytes)
    print(json.dumps([link, slowest(lambda: gather(whole, own), num_bytes - part)]), flush=True)
    distributed.destroy_process_group()
    arena.close()
    shared.close()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
