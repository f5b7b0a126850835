"""Elementwise layer functions on the host, in one pass each: norms, rotations, gated products.

All numbers are float32. Unlike in torch, sums and products are not rounded one by one: results differ in the last bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F

from engine.kernels.elementwise.gates import Activation, gated
from engine.kernels.elementwise.norms import Scaling
from engine.kernels.host import functions, library

_FEW = 1 << 15
"""The number of elements that one thread finishes before a second one would be awake."""

_Kernel = TypeVar("_Kernel", bound=Callable[..., object])


def kernel_for(device: torch.device, dtype: torch.dtype, kernel: _Kernel) -> _Kernel | None:
    """One of the functions below; None where it does not run: off the CPU, in another dtype, without a compiler."""
    is_for = device.type == "cpu" and dtype == torch.float32
    return kernel if is_for and functions.loaded() is not None else None


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the functions below support these tensors: a layer may be called with others."""
    return all(each.device.type == "cpu" and each.dtype == torch.float32 for each in tensors)


def gate_product(gate: torch.Tensor, up: torch.Tensor, activation: int) -> torch.Tensor:
    """`activation(gate) * up`, of one shape."""
    if activation == Activation.GELU:
        return gated(gate, up, Activation.GELU)
    width = gate.shape[-1]
    gate, up = (x if x.stride(-1) == 1 else x.contiguous() for x in (gate, up))
    flat_gate, flat_up = gate.reshape(-1, width), up.reshape(-1, width)
    output = torch.empty(gate.shape)
    pointers = flat_gate.data_ptr(), flat_up.data_ptr(), output.data_ptr()
    work = _Gates(*pointers, len(flat_gate), width, flat_gate.stride(0), flat_up.stride(0), activation)
    _run("gate_rows", work, output.numel())
    return output


def norm(
    rows: torch.Tensor, weight: torch.Tensor, eps: float, scaling: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """RMS norm of rows `[…, width]`: each divided by its root mean square, times weight `[width]`.

    With a bias it is a layer norm, for which torch has a one-pass function, too.
    """
    if bias is not None:
        return F.layer_norm(rows, weight.shape, weight, bias, eps)
    rows, weight = rows.contiguous(), weight.contiguous()
    output = torch.empty(rows.shape)
    plus = 1.0 if scaling == Scaling.WIDE_FROM_ONE else 0.0
    width = rows.shape[-1]
    pointers = rows.data_ptr(), weight.data_ptr(), output.data_ptr()
    _run("norm_rows", _Norms(*pointers, rows.numel() // max(1, width), width, eps, plus), rows.numel())
    return output


def rotate(
    query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, per_pair: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys `[1, heads, rows, dim]` as `elementwise.rotations.rotated` does."""
    return _rotated(query, cosine, sine, per_pair), _rotated(key, cosine, sine, per_pair)


def _rotated(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, per_pair: int) -> torch.Tensor:
    _, count, rows, dim = heads.shape
    if cosine.stride() != sine.stride():
        cosine, sine = cosine.contiguous(), sine.contiguous()
    output = torch.empty(1, rows, count, dim)
    work = _Rotations(
        heads.data_ptr(), cosine.data_ptr(), sine.data_ptr(), output.data_ptr(), rows, count, dim, heads.stride(2),
        heads.stride(1), cosine.shape[-1] * 2 // per_pair, cosine.stride(1), per_pair,
    )  # fmt: skip
    _run("rotate_rows", work, output.numel())
    return output.transpose(1, 2)


class _Gates(ctypes.Structure):
    """The C source's `struct gates`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate", "up", "output")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "gate_row", "up_row", "activation", "next")),
    )


class _Norms(ctypes.Structure):
    """The C source's `struct norms`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "weight", "output")),
        *((name, ctypes.c_int64) for name in ("count", "width")),
        *((name, ctypes.c_float) for name in ("eps", "plus")),
        ("next", ctypes.c_int64),
    )


class _Rotations(ctypes.Structure):
    """The C source's `struct rotations`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("heads", "cosine", "sine", "output")),
        *((name, ctypes.c_int64) for name in ("rows", "count", "dim", "row", "head")),
        *((name, ctypes.c_int64) for name in ("turned", "table_row", "per_pair", "next")),
    )


def _run(name: str, work: ctypes.Structure, numbers: int) -> None:
    kernel = functions.loaded()
    assert kernel is not None
    library.run(getattr(kernel, name), work, 1 if numbers <= _FEW else torch.get_num_threads())
