"""Sums, and functions built on them, in an order of additions that depends on the number of terms alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.kernels.invariant.pointwise import in_vectors

aten = torch.ops.aten


def total(terms: torch.Tensor, dims: Sequence[int], *, keepdim: bool = False) -> torch.Tensor:
    """The sum over `dims`, in the dtype of the terms: halves are added to each other until one term is left.

    Torch's own reductions choose their order by the number of sums.
    """
    for dim in dims:
        terms = _sum_over(terms, dim)
    if not keepdim:
        for dim in sorted((dim % terms.ndim for dim in dims), reverse=True):
            terms = terms.squeeze(dim)
    return terms


def _sum_over(terms: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum over one dimension, which stays with the size 1."""
    count = terms.shape[dim]
    if count == 0:
        return terms.new_zeros([1 if at == dim % terms.ndim else size for at, size in enumerate(terms.shape)])
    half = 1 << (count - 1).bit_length() - 1 if count > 1 else 0
    while count > 1:
        summed = terms.narrow(dim, 0, half)
        rest = terms.narrow(dim, half, count - half)
        if count == 2 * half:
            terms = summed + rest
        else:
            terms = torch.cat(
                (summed.narrow(dim, 0, count - half) + rest, summed.narrow(dim, count - half, 2 * half - count)), dim
            )
        count, half = half, half // 2
    return terms


def mean(numbers: torch.Tensor, dims: Sequence[int], *, keepdim: bool = False) -> torch.Tensor:
    """The mean over `dims`, summed in float32 at least, in the dtype of the numbers."""
    count = 1
    for dim in dims:
        count *= numbers.shape[dim]
    return (total(widened(numbers), dims, keepdim=keepdim) / count).to(numbers.dtype)


def softmax(scores: torch.Tensor, dim: int) -> torch.Tensor:
    """Like `torch.softmax`, in float32 at least."""
    exps = _exps(scores, dim)
    return exps / total(exps, (dim,), keepdim=True)


def log_softmax(scores: torch.Tensor, dim: int) -> torch.Tensor:
    """Like `torch.log_softmax`, in float32 at least."""
    scores = widened(scores)
    least = scores - scores.amax(dim, keepdim=True)
    sums = total(in_vectors(aten.exp.default, (least,), {}), (dim,), keepdim=True)
    logs: torch.Tensor = in_vectors(aten.log.default, (sums,), {})
    return least - logs


def _exps(scores: torch.Tensor, dim: int) -> torch.Tensor:
    scores = widened(scores)
    exps: torch.Tensor = in_vectors(aten.exp.default, (scores - scores.amax(dim, keepdim=True),), {})
    return exps


def cumulated(terms: torch.Tensor) -> torch.Tensor:
    """Cumulative sums over the last dimension, like `torch.cumsum`, by adding at doubling distances."""
    distance = 1
    while distance < terms.shape[-1]:
        terms = torch.cat((terms[..., :distance], terms[..., distance:] + terms[..., :-distance]), dim=-1)
        distance *= 2
    return terms


def layer_norm(
    rows: torch.Tensor, sizes: Sequence[int], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Like `torch.native_layer_norm`: rows, their means and the reciprocals of their deviations."""
    dims = tuple(range(-len(sizes), 0))
    wide = widened(rows)
    middle = mean(wide, dims, keepdim=True)
    apart = wide - middle
    scale = _rsqrt(mean(apart * apart, dims, keepdim=True) + eps)
    normed = apart * scale
    if weight is not None:
        normed = normed * weight
    if bias is not None:
        normed = normed + bias
    return normed.to(rows.dtype), middle, scale


def rms_norm(
    rows: torch.Tensor, sizes: Sequence[int], weight: torch.Tensor | None, eps: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `torch.nn.functional.rms_norm`: rows, and the reciprocals of their root mean squares."""
    wide = widened(rows)
    squares = mean(wide * wide, tuple(range(-len(sizes), 0)), keepdim=True)
    scale = _rsqrt(squares + (torch.finfo(wide.dtype).eps if eps is None else eps))
    normed = wide * scale
    return (normed if weight is None else normed * weight).to(rows.dtype), scale


def _rsqrt(numbers: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = in_vectors(aten.rsqrt.default, (numbers,), {})
    return result


def widened(numbers: torch.Tensor) -> torch.Tensor:
    """float32 for narrower dtypes, else the dtype itself."""
    return numbers.float() if numbers.dtype in (torch.float16, torch.bfloat16) else numbers
