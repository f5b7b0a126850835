"""Merges experts that a checkpoint stores packed one by one into the model's stacked parameter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from engine.checkpoint.quantized.method import Kind
from engine.errors import CheckpointError
from engine.kernels.packed.matrix import PartForm
from engine.kernels.packed.parameter import PackedParameter


@dataclass(frozen=True)
class Piece:
    """A packed matrix of one expert."""

    pattern: str
    """The pattern of the converter that merges it."""
    module: str
    """The name of its module in the checkpoint."""
    kind: Kind
    forms: Mapping[str, PartForm]
    """The tensors that make up the matrix, by part."""
    unread: frozenset[str]
    """The names of further tensors of the module in the checkpoint, which are not read."""


def stacked(pieces: list[Piece], converter: WeightConverter, shape: torch.Size) -> PackedParameter:
    """The parameter `[experts, rows, columns]` that `converter` makes of `pieces`, which are in the order of experts.

    The converter may stack experts, and concatenate the matrices of one expert by rows: the bytes of packed matrices
    can be joined alike. Raises `ValueError` for another converter, and for matrices of different formats,
    `CheckpointError` for missing experts.
    """
    kinds = [type(operation) for operation in converter.operations]
    dims = [getattr(operation, "dim", None) for operation in converter.operations]
    if (kinds, dims) not in (([MergeModulelist], [0]), ([MergeModulelist, Concatenate], [0, 1])):
        told = ", ".join(f"{kind.__name__}({dim})" for kind, dim in zip(kinds, dims, strict=True))
        raise ValueError(f"transformers merges its experts by {told}, which packed matrices cannot be")
    by_pattern = {
        pattern: [piece for piece in pieces if piece.pattern == pattern] for pattern in converter.source_patterns
    }
    count, rows, columns = shape
    for pattern, experts in by_pattern.items():
        _check_experts(pattern, [piece.module for piece in experts], count)
    if rows % len(by_pattern):
        raise ValueError(f"{rows} rows do not go into {len(by_pattern)} matrices")
    kind, forms = pieces[0].kind, pieces[0].forms
    for piece in pieces:
        if (piece.kind, piece.forms) != (kind, forms):
            raise ValueError(f"{piece.module} is packed in another way than {pieces[0].module}, or has another shape")
    matrix = kind.make(torch.Size((rows // len(by_pattern), columns)), forms)
    ordered = [piece for expert in zip(*by_pattern.values(), strict=True) for piece in expert]
    sources = [{part: f"{piece.module}.{part}" for part in forms} for piece in ordered]
    return PackedParameter(matrix, sources, unread=frozenset().union(*(piece.unread for piece in pieces)))


def _check_experts(pattern: str, modules: list[str], count: int) -> None:
    """Raise `CheckpointError` unless modules are those of the experts 0, 1, … of one layer, in this order."""
    numbers = [tuple(re.findall(r"\d+", module)) for module in modules]
    told = [{int(number) for number in place} for place in zip(*numbers, strict=False)] if numbers else []
    expected = list(range(count))
    for place, found in enumerate(told):
        if len(found) == len(modules) and [int(number[place]) for number in numbers] == expected:
            return
    last = f", the last of them {modules[-1]}" if modules else ""
    raise CheckpointError(
        f"{len(modules)} packed matrices of {pattern}{last}, and {count} experts by config.json, numbered from 0, are "
        "expected; the download is incomplete or belongs to another model"
    )
