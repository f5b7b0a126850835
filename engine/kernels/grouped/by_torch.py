"""Mixture of experts with torch's functions, on any device and in any dtype.

In batch-invariant mode (`engine.kernels.invariant`) its products and sums are the mode's.
"""

from __future__ import annotations

import torch

from engine.kernels.grouped.matrices import Matrices
from engine.kernels.grouped.stack import Stack


def mixture(
    matrices: Matrices,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    counts: list[int] | None = None,
) -> torch.Tensor:
    """The weighted sum of the experts that each token chose: hidden `[tokens, hidden size]` -> the same shape.

    index, weights: `[tokens, choices]`; experts are numbered from 0. Choices of experts that do not exist add nothing.
    counts: the number of rows of each expert, if the host knows them; otherwise the host waits for the device.
    """
    num_choices = index.shape[1]
    chosen = index.flatten()
    order = chosen.sort(stable=True).indices
    counts = rows_of_experts(index, matrices.count) if counts is None else counts
    rows = hidden[order.div(num_choices, rounding_mode="floor")].to(matrices.first.dtype)
    between = _products(rows, matrices.first, matrices.first_bias, counts)
    del rows  # plans count how many of these are held at once
    inner = matrices.activation(between)
    del between
    found = _products(inner, matrices.second, matrices.second_bias, counts)
    del inner
    places = torch.empty_like(found)
    places[order] = found
    del found
    terms = places.unflatten(0, (-1, num_choices)) * weights[..., None]
    summed: torch.Tensor = terms.sum(dim=1).to(hidden.dtype)
    return summed


def rows_of_experts(index: torch.Tensor, count: int) -> list[int]:
    """The number of rows of each of `count` experts; the host waits for it."""
    rows: list[int] = torch.bincount(index.flatten(), minlength=count).tolist()
    return rows[:count]


def _products(rows: torch.Tensor, stack: Stack, biases: torch.Tensor | None, counts: list[int]) -> torch.Tensor:
    """Rows `[n, k]`, sorted by expert, each times the matrix `[k, m]` of its expert; zeros for rows without one."""
    result = rows.new_empty(len(rows), stack.shape[2])
    first = 0
    for group in stack.groups(counts):
        for expert, matrix in zip(range(*group), stack.take(*group), strict=True):
            end = first + counts[expert]
            if first == end:
                continue
            part = result[first:end]
            torch.mm(rows[first:end], matrix, out=part)
            if biases is not None:
                part += biases[expert]
            first = end
    result[first:] = 0
    return result
