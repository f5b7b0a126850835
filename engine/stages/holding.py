"""Reduces a model to one stage: some consecutive layers, with the others in other processes."""

from __future__ import annotations

from pathlib import Path

from engine.cache.shape import KVShape
from engine.checkpoint.adapters.declared import adapter_folder
from engine.errors import UnsupportedError
from engine.model.causal_model import CausalModel
from engine.model.unit import Unit


def hold(model: CausalModel, layers: range, path: Path) -> None:
    """Reduce the model in directory `path` to the weights, keys, values and states of `layers`.

    The last layer comes with the head. The token embedding and the parameters outside all layers stay, so that `record`
    works as before. Raises `UnsupportedError` if the directory is an adapter.
    """
    if adapter_folder(path) is not None:
        raise UnsupportedError(
            f"stages: {path} is an adapter, which is merged by a process that has all layers; merge it by peft "
            "(merge_and_unload, save_pretrained), or set stages: 1"
        )
    kept = {"embedding", "outer", *(f"layer.{index}" for index in layers)}
    model.held = layers
    if model.has_head:
        kept.add("head")
    dropped = {name for unit in model.units if unit.name not in kept for name in unit.owners}
    packed = [model.all_packed[name] for name in dropped if name in model.all_packed]
    model.elsewhere = frozenset(dropped.union(*(whole.parts for whole in packed), *(whole.unread for whole in packed)))
    model.units = [unit if unit.name in kept else Unit(unit.name, {}) for unit in model.units]
    for name in dropped:
        del model.state[name]
        model.all_packed.pop(name, None)
        model.packed.pop(name, None)
    model.kv_shapes = [each if at in layers else KVShape.none() for at, each in enumerate(model.kv_shapes)]
