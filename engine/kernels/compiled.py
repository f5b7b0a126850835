"""Kernels of ours that Triton compiles: where they are to be had, and whether rows are where they run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from engine.memory import accelerator

_Kernel = TypeVar("_Kernel")


def where_compiled(load: Callable[[], _Kernel]) -> Callable[[torch.device], _Kernel | None]:
    """What `load` imports, by device: None where Triton does not compile for it, or torch came without Triton."""

    @cache
    def kernel_for(device: torch.device) -> _Kernel | None:
        if not accelerator.runs_triton(device):
            return None
        try:
            return load()
        except ImportError:
            return None

    return kernel_for


def is_there(rows: torch.Tensor) -> bool:
    """Whether rows are where such a kernel runs: layers are called on the host, too, when a model is opened."""
    return rows.is_cuda
