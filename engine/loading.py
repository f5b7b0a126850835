"""Brings a checkpoint's tensors, under whatever names they have there, straight to a model's places."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from engine.checkpoint import tensors
from engine.errors import CheckpointError
from engine.weights import WeightStore

Load = Callable[[], torch.Tensor]


def load_checkpoint(path: Path, store: WeightStore) -> None:
    """Fill `store` from the weight files of `path`.

    Names and layouts are translated by `transformers`' own conversion mapping (core_model_loading.py), one parameter at
    a time, and merged experts one expert at a time: beyond the placed weights this costs no more anonymous memory than
    about one tensor of the checkpoint, whose files are only mapped. Raises `CheckpointError` when parameters are
    missing or have another shape.
    """
    model = store.model
    places = _Places(path, store)
    transforms = get_model_conversion_mapping(model.module)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.module.base_model_prefix
    merged: dict[str, tuple[WeightConverter, list[tuple[str, str, Load]]]] = {}
    for name, load in sorted(tensors(path), key=lambda entry: dot_natural_key(entry[0])):
        target, pattern = rename_source_key(name, renamings, converters, prefix, model.state)
        if target not in model.state and name in model.state:
            target, pattern = name, None
        if target not in model.state:
            continue  # e.g. attention masks that old checkpoints stored
        if pattern is None:
            places.put(target, load())
        else:
            merged.setdefault(target, (converter_of[pattern], []))[1].append((pattern, name, load))
    for target, (converter, sources) in merged.items():
        _convert(target, converter, sources, places)
    places.check()
    store.finish_loading()


def _convert(target: str, converter: WeightConverter, sources: list[tuple[str, str, Load]], places: _Places) -> None:
    model = places.store.model
    by_pattern: dict[str, list[tuple[str, str, Load]]] = {}
    for source in sources:
        by_pattern.setdefault(source[0], []).append(source)
    operations = converter.operations
    stacks = isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
    if stacks and all(getattr(operation, "dim", 0) != 0 for operation in operations[1:]):
        rounds = [list(expert) for expert in zip(*by_pattern.values(), strict=True)]
    else:
        rounds = [sources]
    for index, members in enumerate(rounds):
        one = deepcopy(converter)
        for pattern, name, load in members:
            one.add_tensor(target, name, pattern, load)
        for name, value in one.convert(target, model=model.module, config=model.config).items():
            tensor = value[0] if isinstance(value, list) else value
            if len(rounds) > 1:
                places.put_part(name, tensor, index, len(rounds))
            else:
                places.put(name, tensor)


class _Places:
    """Where parameters and persistent buffers go, and which have arrived."""

    def __init__(self, path: Path, store: WeightStore) -> None:
        self.store = store
        self._path = path
        self._missing = {name for unit in store.model.units for name in unit.owners}
        self._parameters = frozenset(self._missing)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Put a whole parameter or buffer."""
        model = self.store.model
        expected = model.state[name].shape
        if tensor.shape != expected:
            raise CheckpointError(
                f"{self._path}: {name} is {list(tensor.shape)} in the weight files but {list(expected)} by "
                "config.json; they do not belong together"
            )
        if name in self._parameters:
            self.store.put(name, tensor)
            self._missing.discard(name)
        elif name == model.head_name:
            if model.embedding_name in self._missing:  # some checkpoints hold the pair under this name only
                self.store.put(model.embedding_name, tensor)
                self._missing.discard(model.embedding_name)
        else:
            model.module.get_buffer(name).copy_(tensor)

    def put_part(self, name: str, tensor: torch.Tensor, index: int, count: int) -> None:
        """Put slice `index` of `count` along the first dimension, e.g. one expert `[1, …]`."""
        expected = self.store.model.state[name].shape
        if tensor.shape[1:] != expected[1:] or expected[0] != count * tensor.shape[0]:
            raise CheckpointError(
                f"{self._path}: {name} would be {[count * tensor.shape[0], *tensor.shape[1:]]} from the weight files "
                f"but is {list(expected)} by config.json; they do not belong together"
            )
        self.store.put(name, tensor, first_element=index * tensor.numel())
        if index == count - 1:
            self._missing.discard(name)

    def check(self) -> None:
        """Raise `CheckpointError` when something has not arrived."""
        if self._missing:
            raise CheckpointError(
                f"{self._path}: the weight files lack {len(self._missing)} of {len(self._parameters)} parameters, e.g. "
                f"{min(self._missing)}; the download is incomplete or belongs to another model"
            )
