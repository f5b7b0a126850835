"""A kernel that computes what modules compute, on the device and in the dtype of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from engine.kernels import compiled
from engine.kernels.host import rows as host_rows

F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True)
class RowKernel(Generic[F]):
    """A function of rows, and which tensors it supports."""

    call: F
    is_on_host: bool

    def takes(self, *tensors: torch.Tensor) -> bool:
        """Whether it supports these tensors: opening a model calls its layers with others, too."""
        return host_rows.takes(*tensors) if self.is_on_host else compiled.takes(*tensors)


def row_kernel(
    device: torch.device, dtype: torch.dtype, compiled_for: Callable[[torch.device], F | None], on_host: F
) -> RowKernel[F] | None:
    """`compiled_for` tells the kernel for 16 bits, `on_host` is the one for float32 on the CPU; None without one."""
    is_short = dtype in compiled.DTYPES
    call = compiled_for(device) if is_short else host_rows.kernel_for(device, dtype, on_host)
    return None if call is None else RowKernel(call, is_on_host=not is_short)
