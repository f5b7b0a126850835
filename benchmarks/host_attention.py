"""Bytes per second that attention on the host reads, alone and during copies: `python -m benchmarks.host_attention`.

Keys and values are stored as in the KV cache: rows of all heads, sequence by sequence. torch's own
`scaled_dot_product_attention` over the same rows is timed for comparison.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.kernels import host_kernel
from engine.kernels.codec import Codec
from engine.measuring.rates import HEAD_DIM, host_read_rate
from engine.memory import accelerator
from engine.memory.arena import Arena
from engine.planning.hardware import resolve_device
from flexgen_helm.planning.record import write_record

ROOT = Path(__file__).resolve().parent.parent
_COPY_BYTES = 1 << 28


def main() -> int:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--length", type=int, default=528)
    parser.add_argument("--heads", type=int, default=56)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    device = torch.device(resolve_device("auto"))
    record: dict[str, Any] = {
        "sequences": options.sequences,
        "length": options.length,
        "heads": options.heads,
        "threads": torch.get_num_threads(),
        "host_read_bytes_s": host_read_rate(1 << 31, options.seconds),
        "rows": [],
    }
    print(f"host memory, read: {record['host_read_bytes_s'] / 1e9:.1f} GB/s by {record['threads']} threads")
    copies = Copies(device) if accelerator.has_streams(device) else None
    arena = Arena(device)
    for dtype, bits in (
        (torch.float16, 0),
        (torch.bfloat16, 0),
        (torch.float32, 0),
        (torch.float16, 8),
        (torch.float16, 4),
    ):
        width, rows = 2 * options.heads * HEAD_DIM, options.length + 16
        block = torch.randn(rows, width).to(dtype)
        block = Codec(bits).encode_rows(block) if bits else block
        table = arena.empty(options.sequences * rows * block.shape[1] * block.itemsize, "host")
        table = table.view(block.dtype).view(-1, block.shape[1])
        for first in range(0, len(table), rows):
            table[first : first + rows] = block
        query = torch.randn(options.sequences, 1, options.heads, HEAD_DIM).to(dtype)
        firsts, lengths = torch.arange(options.sequences) * rows, torch.full((options.sequences,), options.length)
        dims, num_bytes = (options.heads, HEAD_DIM, HEAD_DIM), options.sequences * options.length * table[0].nbytes
        calls: dict[str, Callable[[], object]] = {
            "engine": partial(host_kernel.attend, table, firsts, lengths, query, dims, dtype, bits, 0.1)
        }
        if not bits:
            seen = table.view(options.sequences, rows, 2, options.heads, HEAD_DIM)[:, : options.length]
            calls["torch"] = partial(host_kernel.by_torch, query, *seen.permute(2, 0, 3, 1, 4), 0.1)
        for name, call in calls.items():
            row = {"dtype": str(dtype).removeprefix("torch."), "bits": bits, "form": name, "bytes": num_bytes}
            call()
            row["alone_bytes_s"] = num_bytes * _calls_a_second(call, options.seconds)
            if copies is not None:
                with copies:
                    row["beside_copies_bytes_s"] = num_bytes * _calls_a_second(call, options.seconds)
                row["copied_bytes_s"] = copies.bytes_s
            record["rows"].append(row)
            print("  ".join(f"{k} {v / 1e9:.1f} GB/s" if k.endswith("_s") else f"{v}" for k, v in row.items()))
        arena.free(table)
    print(write_record("host-attention", record, options.out))
    return 0


def _calls_a_second(call: Callable[[], object], seconds: float) -> float:
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        call()
        count += 1
    return count / spent


class Copies:
    """Copies from page-locked host memory to the device, one after the other, while its context is active."""

    def __init__(self, device: torch.device) -> None:
        self._arena, self._device = Arena(device), device
        self._host, self._there = self._arena.empty(_COPY_BYTES, "host"), self._arena.empty(_COPY_BYTES, "device")
        self.bytes_s = 0.0
        """The rate of the last use."""

    def _run(self) -> None:
        stream, start, count = accelerator.new_stream(self._device), time.perf_counter(), 0
        while not self._stop.is_set():
            with accelerator.on_stream(stream, self._device):
                self._there.copy_(self._host, non_blocking=True)
            stream.synchronize()
            count += 1
        self.bytes_s = count * _COPY_BYTES / (time.perf_counter() - start)

    def __enter__(self) -> Copies:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    raise SystemExit(main())
