"""Which parameters of a unit are stored encoded or packed, and how many bytes all of them are then."""

from __future__ import annotations

from engine.kernels.codec import GROUP, Codec
from engine.model.causal_model import CausalModel, Unit

_CODED_PART = 0.01
"""Of a unit's numbers, what a parameter must have to be encoded: routers and norms are small, and matter."""


def coded_names(model: CausalModel, unit: Unit) -> frozenset[str]:
    """Parameters of a unit that a codec takes: a layer's large matrices."""
    if not unit.name.startswith("layer."):
        return frozenset()
    shapes = {name: model.state[name].shape for name in unit.owners}
    least = _CODED_PART * sum(shape.numel() for shape in shapes.values())
    return frozenset(
        name
        for name, shape in shapes.items()
        # Experts arrive one at a time, each with groups of its own.
        if len(shape) > 1 and shape.numel() >= least and shape[-2:].numel() % GROUP == 0
    )


def encoded_names(model: CausalModel, unit: Unit, codec: Codec | None) -> frozenset[str]:
    """Parameters of a unit that are stored encoded, by the codec or as the checkpoint packs them."""
    packed = frozenset(name for name in unit.owners if name in model.packed)
    return packed or (frozenset() if codec is None else coded_names(model, unit))


def stored_sizes(model: CausalModel, unit: Unit, codec: Codec | None) -> dict[str, int]:
    """Bytes of each parameter of a unit, as it is stored."""
    sizes = whole_sizes(model, unit)
    for name in encoded_names(model, unit, codec):
        like = model.state[name]
        if name in model.packed:
            sizes[name] = model.packed[name].num_bytes
        elif codec is not None:
            sizes[name] = codec.num_bytes(like.numel(), like.dtype)
    return sizes


def whole_sizes(model: CausalModel, unit: Unit) -> dict[str, int]:
    """Bytes of each parameter of a unit, as it is computed with."""
    return {name: model.state[name].numel() * model.state[name].element_size() for name in unit.owners}
