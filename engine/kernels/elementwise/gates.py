"""Gated products as model families write them, and the kernel that replaces them where a device can have it."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import torch
import torch.nn.functional as F

from engine.kernels.compiled import where_compiled


class Activation(IntEnum):
    """The function of a gate."""

    SILU = 0
    GELU = 1
    """GELU by the error function."""
    GELU_TANH = 2
    """GELU by the hyperbolic tangent."""

    def __call__(self, gate: torch.Tensor) -> torch.Tensor:
        """Apply torch's function, in the dtype of the gate."""
        if self is Activation.SILU:
            return F.silu(gate)
        return F.gelu(gate, approximate="tanh" if self is Activation.GELU_TANH else "none")


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """`activation(gate) * up`, of one shape and dtype; the function's values are rounded before the product."""
    return activation(gate) * up


Kernel = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""The kernel's signature: `gated` for two 16-bit tensors of one dtype and shape on the current device, with any
strides."""


@where_compiled
def kernel_for() -> Kernel:
    """The kernel's function for a device; None without one."""
    from engine.kernels.elementwise.gate_kernel import gate_product

    return gate_product
