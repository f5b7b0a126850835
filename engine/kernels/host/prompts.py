"""Prefill attention on the host: each row attends to [prefix | own tokens up to itself], in one pass without a mask."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from engine.kernels.host import functions, library

_ROWS_OF_A_TASK = 384
"""The rows of one head of queries per task; `rows_of_task` of the C source must agree."""


@dataclass(frozen=True)
class Run:
    """Adjacent spans that continue the same prefix, or none."""

    borders: Sequence[int]
    """The first row of each span, and the end of the last one."""
    prefix: tuple[torch.Tensor, torch.Tensor] | None
    """The prefix's keys and values `[length, KV heads, dim]`."""


class _Work(ctypes.Structure):
    """The C source's `struct work`."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("runs", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("tasks", "kv_heads", "copies", "key_dim", "value_dim")),
        ("query", ctypes.c_void_p),
        ("query_row", ctypes.c_int64),
        ("query_head", ctypes.c_int64),
        ("output", ctypes.c_void_p),
        ("scaling", ctypes.c_float),
        ("failed", ctypes.c_int64),
        ("next", ctypes.c_int64),
    )


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: Sequence[Run], scaling: float
) -> torch.Tensor | None:
    """Attention of rows to their run's prefix and to their own span up to themselves; None where not available.

    It needs a C compiler and float32.

    query `[rows, heads, dim]`, key and value `[rows, KV heads, dim]`, whose runs follow each other from row 0 on;
    returns `[rows, heads, value dim]`.
    """
    parts = [query, key, value, *(part for run in runs if run.prefix is not None for part in run.prefix)]
    if any(part.dtype != torch.float32 for part in parts) or (kernel := functions.loaded()) is None:
        return None
    query, key, value = (_with_dense_rows(x) for x in (query, key, value))
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # until the kernel is done
    keys: list[tuple[int, ...]] = []
    spans: list[tuple[int, int, int]] = []
    of_runs: list[tuple[int, int, int, int, int]] = []

    def add(key: torch.Tensor, value: torch.Tensor) -> int:
        strides = key.stride(0), key.stride(1), value.stride(0), value.stride(1)
        keys.append((key.data_ptr(), value.data_ptr(), len(key), *strides))
        return len(keys) - 1

    heads, kv_heads, tasks = query.shape[1], key.shape[1], 0
    copies = heads // kv_heads
    for run in runs:
        first, end, of_prefix = run.borders[0], run.borders[-1], -1
        if run.prefix is not None:
            kept.append((_with_dense_rows(run.prefix[0]), _with_dense_rows(run.prefix[1])))
            of_prefix = add(*kept[-1])
        of_runs.append((first, end, len(spans), len(spans) + len(run.borders) - 1, of_prefix))
        spans += [(a, b, add(key[a:b], value[a:b])) for a, b in pairwise(run.borders)]
        tasks += -(-(end - first) // max(1, _ROWS_OF_A_TASK // copies)) * kv_heads
    output = query.new_empty(len(query), heads, value.shape[2])
    tables = [torch.tensor(each, dtype=torch.int64) for each in (keys, spans, of_runs)]
    work = _Work(
        *(each.data_ptr() for each in tables), tasks, kv_heads, copies, query.shape[2], value.shape[2],
        query.data_ptr(), query.stride(0), query.stride(1), output.data_ptr(), scaling,
    )  # fmt: skip
    library.run(kernel.attend_prompts, work, torch.get_num_threads())
    if work.failed:
        raise MemoryError("no memory for a block of the scores of attention on the host")
    return output


def _with_dense_rows(heads: torch.Tensor) -> torch.Tensor:
    """Make rows `[…, heads, dim]` contiguous within each row."""
    return heads if heads.stride(-1) == 1 else heads.contiguous()
