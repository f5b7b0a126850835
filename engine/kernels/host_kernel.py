"""Compiles our C kernel for attention on the host, once per machine, and calls it on all cores."""

from __future__ import annotations

import ctypes
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from engine.kernels.codec import GROUP
from engine.kernels.host import library
from engine.memory import accelerator
from engine.memory.cores import usable_cores

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("host_attention.c")
_HOST = torch.device("cpu")
_PIECE_BYTES = 8192
"""The approximate bytes of a row that a task reads in one piece."""
_SLICE_BYTES = 1 << 20
"""The bytes of keys and values for which it pays to wake a thread."""
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _Work(ctypes.Structure):
    """The C source's `struct work`."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("firsts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in ("kv_heads", "key_dim", "value_dim", "steps", "copies", "block", "tasks", "type", "bits")
        ),
        ("query", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("logsumexp", ctypes.c_void_p),
        ("scaling", ctypes.c_float),
        ("next", ctypes.c_int64),
    )


def attend(
    table: torch.Tensor,
    firsts: torch.Tensor,
    lengths: torch.Tensor,
    query: torch.Tensor,
    dims: tuple[int, int, int],
    dtype: torch.dtype,
    bits: int,
    scaling: float,
    target: torch.device = _HOST,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Attention of each sequence's new rows to all its rows of a table; None where the kernel is not available.

    It is not available without a compiler, and for codes of which one group has both keys and values.

    table: `[rows, …]`, rows of keys and values of `dtype`, or of their codes of `bits` bits (0: none).
        firsts, lengths: int64 `[sequences]`, a sequence's first row and its number of rows, the new ones included.
        query: `[sequences, steps, heads, dim]` of `dtype`; dims: kv heads, a key's size, a value's.
        target: the device to which the results will be copied while the kernel runs.

    Returns `[sequences, steps, heads, value dim]` of `dtype` and float32 log-sum-exps `[sequences, steps, heads]`.

    It does not run on torch's own threads: after some work they wait for more by spinning for milliseconds, on the
    cores that ours need.
    """
    (sequences, steps, heads), (kv_heads, key_dim, value_dim) = query.shape[:3], dims
    kernel = _kernel()
    if kernel is None or (bits and (kv_heads * key_dim % GROUP or kv_heads * value_dim % GROUP)):
        return None
    query = query.to(dtype).contiguous()
    output = _transit(target, dtype, sequences, steps, heads, value_dim)
    logsumexp = _transit(target, torch.float32, sequences, steps, heads)
    row_bytes = table.stride(0) * table.itemsize
    block = _block(sequences, dims, row_bytes, bits)
    tasks = sequences * -(-kv_heads // block)
    work = _Work(
        table.data_ptr(), row_bytes, firsts.data_ptr(), lengths.data_ptr(), kv_heads, key_dim, value_dim, steps,
        heads // kv_heads, block, tasks, _TYPES[dtype], bits, query.data_ptr(), output.data_ptr(),
        logsumexp.data_ptr(), scaling,
    )  # fmt: skip
    count = max(1, min(tasks, _threads(), int(lengths.sum()) * row_bytes // _SLICE_BYTES))

    def take(_: int) -> int:
        return int(kernel.attend(ctypes.byref(work)))

    failed = [take(0)] if count == 1 else list(_pool().map(take, range(count)))  # all end before their memory may go
    if any(failed):
        raise MemoryError("no memory for the scores of attention on the host")
    return output, logsumexp


def _transit(target: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return accelerator.transit(target, math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def _block(sequences: int, dims: tuple[int, int, int], row_bytes: int, bits: int) -> int:
    """The heads of a task: pieces of about `_PIECE_BYTES`, smaller for few sequences; of codes, whole groups."""
    kv_heads, key_dim, value_dim = dims
    piece = min(_PIECE_BYTES, row_bytes * sequences // (4 * _threads()))
    least = 1
    while bits and (least * key_dim % GROUP or least * value_dim % GROUP):
        least += 1
    return min(kv_heads, max(1, round(2 * kv_heads * piece / row_bytes / least)) * least)


@cache
def _threads() -> int:
    return usable_cores()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads(), thread_name_prefix="flexgen-attend")


@cache
def _kernel() -> ctypes.CDLL | None:
    """The compiled kernel; None (after one log line) where it is not available."""
    try:
        kernel = ctypes.CDLL(str(library.compiled("host-attention", [_SOURCE])))
        kernel.attend.argtypes = (ctypes.c_void_p,)
        kernel.attend.restype = ctypes.c_int
    except library.FAILURES as error:
        reason = library.reason_of(error)
        _LOG.warning("attention on the host runs on torch's kernel, slower in 16 bits: %s", reason)
        return None
    return kernel


def by_torch(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by torch's own kernel, which is fast in 16 bits only on CPUs with AMX.

    query `[sequences, steps, heads, dim]`, keys, values `[sequences, kv heads, length, dim]`, the new rows included.
    Returns `[sequences, steps, heads, dim]` and float32 log-sum-exps `[sequences, steps, heads]`.
    """
    steps, copies = query.shape[1], query.shape[2] // keys.shape[1]
    if copies > 1:
        keys, values = keys.repeat_interleave(copies, dim=1), values.repeat_interleave(copies, dim=1)
    mask = None
    if steps > 1:
        seen = torch.ones(steps, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - steps)
        mask = torch.zeros(seen.shape, dtype=query.dtype).masked_fill_(~seen, -math.inf)
    result, logsumexp, *_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(1, 2), keys, values, 0.0, False, attn_mask=mask, scale=scaling
    )
    return result.transpose(1, 2), logsumexp.transpose(1, 2)
