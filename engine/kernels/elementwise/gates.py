"""Gated products as families write them between matrices, and one kernel in their place where a device can have it."""

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
    """By the error function."""
    GELU_TANH = 2
    """By the hyperbolic tangent."""

    def __call__(self, gate: torch.Tensor) -> torch.Tensor:
        """By torch's function, in the dtype of the gate."""
        if self is Activation.SILU:
            return F.silu(gate)
        return F.gelu(gate, approximate="tanh" if self is Activation.GELU_TANH else "none")


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """`activation(gate) * up`, of one shape and dtype: the function's values are rounded, and then the product's."""
    return activation(gate) * up


Kernel = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""`gated` for two tensors of 16 bits of one dtype and shape on the current device, with any strides."""


@where_compiled
def kernel_for() -> Kernel:
    """Our kernel's function."""
    from engine.kernels.elementwise.gate_kernel import gate_product

    return gate_product
