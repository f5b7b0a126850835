"""A matrix product with a bias and ReLU, fused into the product's kernel."""

from __future__ import annotations

import torch


def rectified_product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`relu(rows @ weight.T + bias)` of rows `[…, n]`, weight `[m, n]` and bias `[m]`: `[…, m]`.

    On a card cuBLAS adds the bias and cuts off what is negative in the product's own kernel. A sum that is rounded
    before or after that is the same.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    found: torch.Tensor = torch.ops.aten._addmm_activation(bias, flat, weight.t())
    return found.view(*rows.shape[:-1], weight.shape[0])
