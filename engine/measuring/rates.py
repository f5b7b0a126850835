"""The rates that a device, its link and the host reach: medians of repeated runs on random numbers, after a warm-up."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import cycle, pairwise

import torch
import torch.nn.functional as F

from engine.kernels import host_kernel
from engine.memory import accelerator
from engine.memory.arena import Arena

HEADS, HEAD_DIM = 32, 128
_CPU = torch.device("cpu")
_WARM_UPS = 2
_FEWEST = 3
_RUN_SECONDS = 0.005
"""The least duration of a timed run, so that waiting for its end is a negligible part: short calls are repeated."""
_RANDOM = 1 << 22
"""The count of random numbers that are drawn; longer tensors repeat them, because a host draws slowly."""


def median_seconds(
    call: Callable[[], object],
    device: torch.device,
    *,
    seconds: float = math.inf,
    times: int = 9,
    prepare: Callable[[], object] | None = None,
) -> float:
    """The median duration of `call` on `device` over `times` runs, or fewer (at least three) that take `seconds`.

    `prepare` is called before each run, and not timed; then a run is one call.
    """
    calls, taken = 1, list[float]()
    for run in range(_WARM_UPS + times):
        if len(taken) >= _FEWEST and sum(taken) * calls >= seconds:
            break
        if prepare is not None:
            prepare()
        accelerator.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        accelerator.synchronize(device)
        spent = (time.perf_counter() - start) / calls
        if run >= _WARM_UPS:
            taken.append(spent)
        elif run == _WARM_UPS - 1 and prepare is None:
            calls = max(1, min(100, math.ceil(_RUN_SECONDS / max(spent, 1e-9))))
    return statistics.median(taken)


def link_rates(device: torch.device, num_bytes: int, seconds: float = math.inf) -> tuple[float, float, float]:
    """The rates in bytes per second to `device`, from it, and in both directions at once.

    Host memory is page-locked like the engine's. On the CPU all three are copies in host memory, and "at once" means
    one after the other.
    """
    arena = Arena(device)
    try:
        hosts = [_fill(arena.empty(num_bytes, "host")) for _ in range(2)]
        theirs = [_fill(arena.empty(num_bytes, "device")) for _ in range(2)]
        streams = [accelerator.new_stream(device) for _ in range(2)]

        def both() -> None:
            for stream, target, source in ((streams[0], theirs[0], hosts[0]), (streams[1], hosts[1], theirs[1])):
                with nullcontext() if stream is None else accelerator.on_stream(stream, device):
                    target.copy_(source, non_blocking=True)

        def to_device() -> None:
            theirs[0].copy_(hosts[0], non_blocking=True)

        def from_device() -> None:
            hosts[1].copy_(theirs[1], non_blocking=True)

        up, down, together = (median_seconds(call, device, seconds=seconds) for call in (to_device, from_device, both))
        return num_bytes / up, num_bytes / down, 2 * num_bytes / together
    finally:
        accelerator.synchronize(device)
        arena.close()


def device_copy_rate(device: torch.device, num_bytes: int, seconds: float = math.inf) -> float:
    """The bytes per second that a copy within the memory of `device` reads and writes."""
    here, there = (_random(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * num_bytes / median_seconds(lambda: there.copy_(here), device, seconds=seconds)


def gemm_rate(device: torch.device, dtype: torch.dtype, rows: int, inner: int, columns: int) -> float:
    """The operations per second of a product `[rows, inner] @ [inner, columns]` of random numbers."""
    return gemm_rates(device, dtype, (rows,), inner, columns)[rows]


def gemm_rates(
    device: torch.device,
    dtype: torch.dtype,
    rows: Sequence[int],
    inner: int,
    columns: int,
    *,
    ring_bytes: int = 0,
    seconds: float = math.inf,
) -> dict[int, float]:
    """The operations per second of products with a layer's weights, by rows; products that take too long are left out.

    `ring_bytes`: the size of all weights that are multiplied with in turn, as in a sweep, so that none is still in a
    cache.
    """
    count = max(2, ring_bytes // (inner * columns * dtype.itemsize))
    weights = cycle(_random(count, columns, inner, dtype=dtype, device=device).unbind())
    rates: dict[int, float] = {}
    for num_rows, following in pairwise([*sorted(rows), 0]):
        left = _random(num_rows, inner, dtype=dtype, device=device)
        spent = _product_seconds(left, weights.__next__, seconds)
        rates[num_rows] = 2 * num_rows * inner * columns / spent
        if spent * following / num_rows > seconds:
            break
    return rates


def _product_seconds(left: torch.Tensor, weight: Callable[[], torch.Tensor], seconds: float) -> float:
    return median_seconds(lambda: F.linear(left, weight()), left.device, seconds=seconds)


def prefill_attention_rate(
    device: torch.device, dtype: torch.dtype, sequences: int, context: int, seconds: float = math.inf
) -> float:
    """The operations per second of causal attention among the tokens of each sequence; masked pairs are not counted."""
    query, key, value = (_random(sequences, HEADS, context, HEAD_DIM, dtype=dtype, device=device) for _ in range(3))
    spent = median_seconds(
        lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True), device, seconds=seconds
    )
    pairs = sequences * HEADS * context * (context + 1) // 2
    return 4 * pairs * HEAD_DIM / spent


def decode_attention_rate(
    device: torch.device,
    dtype: torch.dtype,
    num_bytes: int,
    context: int,
    seconds: float = math.inf,
) -> float:
    """The bytes of keys and values per second that decode attention of many sequences reads.

    `num_bytes`: the approximate size of all keys and values.
    """
    sequences = max(1, num_bytes // (2 * HEADS * context * HEAD_DIM * dtype.itemsize))
    key, value = (_random(sequences, HEADS, context, HEAD_DIM, dtype=dtype, device=device) for _ in range(2))
    query = _random(sequences, HEADS, 1, HEAD_DIM, dtype=dtype, device=device)
    spent = median_seconds(lambda: F.scaled_dot_product_attention(query, key, value), device, seconds=seconds)
    return (key.nbytes + value.nbytes) / spent


def host_read_rate(num_bytes: int, seconds: float = math.inf) -> float:
    """The bytes per second that all cores read from host memory."""
    numbers = _random(num_bytes // 4, dtype=torch.float32, device=_CPU)
    return numbers.nbytes / median_seconds(numbers.sum, _CPU, seconds=seconds)


def host_attention_rate(
    dtype: torch.dtype,
    num_bytes: int,
    context: int,
    seconds: float = math.inf,
    prepare: Callable[[], object] | None = None,
) -> float:
    """Like `decode_attention_rate`, on the host, over rows in the KV cache's layout."""
    width = 2 * HEADS * HEAD_DIM
    sequences = max(1, num_bytes // (context * width * dtype.itemsize))
    table = _random(sequences * context, width, dtype=dtype, device=_CPU)
    query = _random(sequences, 1, HEADS, HEAD_DIM, dtype=dtype, device=_CPU)
    firsts, lengths = torch.arange(sequences) * context, torch.full((sequences,), context)
    keys, values = table.view(sequences, context, 2, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)

    def attend() -> None:
        dims = HEADS, HEAD_DIM, HEAD_DIM
        if host_kernel.attend(table, firsts, lengths, query, dims, dtype, 0, 1.0) is None:
            host_kernel.by_torch(query, keys, values, 1.0)

    return table.nbytes / median_seconds(attend, _CPU, seconds=seconds, prepare=prepare)


def host_attention_beside_copy_rate(
    device: torch.device,
    dtype: torch.dtype,
    num_bytes: int,
    context: int,
    seconds: float,
    *,
    copy_bytes: int,
    copy_seconds: float,
) -> float:
    """Like `host_attention_rate`, during copies of `copy_bytes` each to `device` for `copy_seconds`; needs streams."""
    arena, stream = Arena(device), accelerator.new_stream(device)
    try:
        host, here = _fill(arena.empty(copy_bytes, "host")), _fill(arena.empty(copy_bytes, "device"))

        def copy() -> None:
            here.copy_(host, non_blocking=True)

        with accelerator.on_stream(stream, device):
            one = median_seconds(copy, device, times=_FEWEST)

        def start_copies() -> None:
            accelerator.synchronize(device)  # of the run before
            with accelerator.on_stream(stream, device):
                for _ in range(min(1000, math.ceil(copy_seconds / one))):
                    copy()

        return host_attention_rate(dtype, num_bytes, context, seconds, start_copies)
    finally:
        accelerator.synchronize(device)
        arena.close()


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random numbers instead of zeros: zeros are read from a single page, and multiplied at less power."""
    return _fill(torch.empty(shape, dtype=dtype, device=device))


def _fill(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a new tensor with random numbers, and return it."""
    flat = tensor.view(-1)
    generator = torch.Generator(tensor.device).manual_seed(0)  # the caller's own draws stay as they were
    size = (min(len(flat), _RANDOM),)
    if tensor.dtype is torch.uint8:
        drawn = torch.randint(1, 256, size, dtype=torch.uint8, device=tensor.device, generator=generator)
    else:
        drawn = torch.randn(size, device=tensor.device, generator=generator).to(tensor.dtype)
    for part in flat.split(_RANDOM):
        part.copy_(drawn[: len(part)])
    return tensor
