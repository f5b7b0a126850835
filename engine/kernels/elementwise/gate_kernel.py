"""The Triton kernel for gated products in 16 bits (SwiGLU, GeGLU), on accelerators that have Triton.

With torch's functions the rows between the gate's matrix and the down projection are read or written five times; here
three times. It rounds where torch's functions round.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 2048
"""The number of row elements that one program computes."""


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    gate,
    up,
    result,
    gate_row,
    up_row,
    width,
    activation: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    number = tl.load(gate + row * gate_row + column, mask=inside, other=0.0)
    kind = number.dtype
    number = number.to(tl.float32)
    factor = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    if activation == 0:
        opened = number / (1.0 + tl.exp(-number))
    elif activation == 1:
        opened = 0.5 * number * (1.0 + tl.erf(number * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (number + 0.044715 * number * number * number)
        tangent = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * inner))
        opened = 0.5 * number * (1.0 + tangent)
    opened = opened.to(kind).to(tl.float32)
    tl.store(result + row * width + column, (opened * factor).to(kind), mask=inside)


def gate_product(gate: torch.Tensor, up: torch.Tensor, activation: int) -> torch.Tensor:
    """`activation(gate) * up` `[…, width]` as `gates.gated` computes it, on the current device.

    activation: see `engine.kernels.elementwise.gates.Activation`.
    """
    width = gate.shape[-1]
    rows = [part if part.stride(1) == 1 else part.contiguous() for part in (x.reshape(-1, width) for x in (gate, up))]
    result = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not result.numel():
        return result
    block = min(_BLOCK, triton.next_power_of_2(width))
    kernel: Any = _kernel
    kernel[(len(rows[0]), triton.cdiv(width, block))](
        *rows,
        result,
        rows[0].stride(0),
        rows[1].stride(0),
        width,
        activation=int(activation),
        block=block,
        num_warps=4,
    )
    return result
