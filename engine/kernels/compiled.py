"""Availability of Triton kernels: on which devices Triton compiles, and whether rows are on one of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from engine.memory import accelerator

_Kernel = TypeVar("_Kernel")

DTYPES = (torch.float16, torch.bfloat16)
"""The dtypes for which such kernels of layers are written."""


def where_compiled(load: Callable[[], _Kernel]) -> Callable[[torch.device], _Kernel | None]:
    """The result of `load` (an import) by device; None where Triton does not compile for it, or is not installed."""

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
    """Whether rows are on a device where such a kernel runs: opening a model calls its layers on the host, too."""
    return rows.is_cuda


def takes(*tensors: torch.Tensor) -> bool:
    """Whether all these tensors are there, in one dtype of 16 bits."""
    dtype = tensors[0].dtype
    return dtype in DTYPES and all(each.dtype == dtype and is_there(each) for each in tensors)
