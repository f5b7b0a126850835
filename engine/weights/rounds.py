"""Groups the tensors of a checkpoint that are converted together where experts are merged into one parameter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers.core_model_loading import MergeModulelist, WeightConverter

from engine.errors import CheckpointError

Load = Callable[[], torch.Tensor]
Source = tuple[str, str, Load]
"""The converter's pattern, the name in the checkpoint, and a function that returns the tensor."""


def rounds_of(path: Path, target: str, converter: WeightConverter, sources: list[Source]) -> list[list[Source]]:
    """Sources that are converted together: all of a parameter, or, where experts are merged, one expert at a time.

    Raises `CheckpointError` unless all experts have the same tensors, of the same shapes.
    """
    by_pattern: dict[str, list[Source]] = {}
    for source in sources:
        by_pattern.setdefault(source[0], []).append(source)
    operations = converter.operations
    stacks = isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
    if stacks and all(getattr(operation, "dim", 0) != 0 for operation in operations[1:]):
        for same in by_pattern.values():
            _check_alike(path, same)
        numbers = {pattern: len(same) for pattern, same in by_pattern.items()}
        if len(set(numbers.values())) > 1:
            told = ", ".join(f"{count} of {pattern}" for pattern, count in numbers.items())
            raise CheckpointError(f"{path}: the weight files have {told} for {target}; as many of each are expected")
        return [list(expert) for expert in zip(*by_pattern.values(), strict=True)]
    return [sources]


def _check_alike(path: Path, same: list[Source]) -> None:
    """Raise `CheckpointError` unless tensors of several experts have one shape."""
    (_, first, load), *others = same
    shape = load().shape
    for _, name, load_other in others:
        if (found := load_other().shape) != shape:
            raise CheckpointError(
                f"{path}: {name} is {list(found)} in the weight files, and {first} is {list(shape)}; experts of one "
                "layer have one shape"
            )
