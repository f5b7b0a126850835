"""The division of a model into stages, and the sizes that all stages are planned with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from engine.cache.tables import cache_row_bytes
from engine.checkpoint.adapters.declared import adapter_folder
from engine.errors import UnsupportedError
from engine.kernels.codec import Codec
from engine.memory.tiers import TIERS, Tier
from engine.model.causal_model import CausalModel
from engine.planning.model_shape import ModelShape
from engine.stages.cut import cut_layers


@dataclass(frozen=True, kw_only=True)
class Division:
    """A model's stages. All have the same plan, so that cache rows allocated by one stage exist in every other."""

    layers: list[range]
    """The layers of each stage."""
    shape: ModelShape
    """The shape of the largest stage."""
    row_bytes: dict[Tier, int]
    """Bytes of a token's keys and values in the stage where they are largest, by tier."""
    slot_bytes: dict[Tier, int]
    """Bytes of a sequence's states in the stage where they are largest, by tier."""


def divide(model: CausalModel, path: Path, shape: ModelShape, count: int, cache_codec: Codec | None) -> Division:
    """Divide a model of this shape, of directory `path`, into `count` stages of about as many bytes of weights.

    Raises `UnsupportedError` where layers hand on more than hidden states, which no stage sends to the next one, and
    where the directory is an adapter; `ConfigError` where there are fewer layers than stages.
    """
    if adapter_folder(path) is not None:
        raise UnsupportedError(
            f"stages: {path} is an adapter, which is merged by a process that has all layers; merge it by peft "
            "(merge_and_unload, save_pretrained), or set stages: 1"
        )
    if model.sweeping.handed_row_bytes or model.sweeping.puts_down:
        raise UnsupportedError(
            f"stages: layers of {type(model.module).__name__} ({model.config.model_type}) hand on more than hidden "
            "states to later ones, and stages send each other only those; set stages: 1"
        )
    *layer_bytes, head = shape.unit_bytes
    parts = cut_layers(layer_bytes, 0 if model.is_tied else head, count)
    units = [  # every stage has a tied head as its embedding
        (*layer_bytes[part.start : part.stop], head if model.is_tied or part.stop == len(layer_bytes) else 0)
        for part in parts
    ]
    *others, _ = sorted(max(units, key=sum))
    largest_unit = max(map(max, units))  # that passes through a slot, in whatever stage
    rows = [cache_row_bytes([model.kv_shapes[at] for at in part], model.dtype, cache_codec) for part in parts]
    states = [sum(state.num_bytes for at in part if (state := model.state_shapes[at]) is not None) for part in parts]
    row_bytes: dict[Tier, int] = {tier: max(each[tier] for each in rows) for tier in TIERS}
    return Division(
        layers=parts,
        shape=replace(
            shape, unit_bytes=(*others, largest_unit), cache_row_bytes=row_bytes["device"], state_bytes=max(states)
        ),
        row_bytes=row_bytes,
        slot_bytes=dict.fromkeys(TIERS, max(states)),
    )
