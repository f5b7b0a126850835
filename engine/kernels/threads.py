"""Sets the number of threads that torch uses on the host."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.memory.cores import usable_cores

_ONE_THREAD = threading.RLock()


def limit_threads(num_processes: int = 1) -> None:
    """Limit torch's threads to the process's cores, or to the processor time that control groups grant.

    Of `num_processes` that compute at the same time, each gets an equal share of the cores, at least one.

    Torch knows which cores a process may run on, but no quota. With more threads than that, those whose time is used up
    keep the others waiting: half a core computed 2.7 times as many products with one thread as with two. The limit
    applies to the whole process; OMP_NUM_THREADS or MKL_NUM_THREADS take precedence.
    """
    most = max(1, usable_cores() // num_processes)
    if not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys() and torch.get_num_threads() > most:
        torch.set_num_threads(most)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes with one thread: many small functions take longer with more.

    Where other processes use the same cores, each function waits until all its threads had their turn. It applies to
    the whole process: another thread that enters waits until this one has left.
    """
    with _ONE_THREAD:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
