"""What estimates need of a model, under every codec; shipped for shapes that `plan` knows by name. Imports no torch.

Building a model without weights takes torch and seconds. Its sizes depend on its configuration alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.config import count_of
from engine.errors import ConfigError
from engine.memory.tiers import Tier
from engine.planning.model_shape import ModelShape
from engine.policy import Bits, Policy, WeightCodes, only_bfloat16
from flexgen_helm.planning.sizes import Sizes

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.model.causal_model import CausalModel
    from engine.workers.remote_engine import RemoteEngine

_BITS: tuple[Bits, ...] = (None, 8, 4)
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
_LAYER = "layer."


@dataclass(frozen=True, kw_only=True)
class Coded:
    """What depends on the codecs of weights and cache."""

    stored: Mapping[str, int]
    """Bytes of each unit's weights, as they are stored."""
    row_bytes: Mapping[Tier, int]
    """The bytes of a token's keys and values in all layers, by tier."""
    expanded_bytes: int
    """As in `Sizes`."""
    expert_bytes: int
    """As in `Sizes`."""
    shape: ModelShape
    """What the engine's planner needs."""


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """A model in numbers."""

    layer_parameters: int
    """As in `Sizes`, like the following."""
    head_parameters: int
    attention_width: int
    hidden_row_bytes: int
    num_layers: int
    head: str
    """The unit that a sweep ends with."""
    coded: Mapping[tuple[WeightCodes, Bits], Coded]
    """The sizes by the codes of weights and the bits of keys and values, as far as they can be encoded."""

    @property
    def can_encode_weights(self) -> bool:
        """Whether a codec takes weights: not those of a checkpoint that comes quantized."""
        return (4, None) in self.coded

    @property
    def can_encode_lossless(self) -> bool:
        """Whether a codec takes weights without changing them: those of bfloat16."""
        return ("lossless", None) in self.coded

    def not_encoded(self, codes: WeightCodes) -> str:
        """Why weights cannot be encoded so."""
        if codes == "lossless" and self.can_encode_weights:
            return only_bfloat16("another dtype")
        return "compress-weight: this model is already quantized; leave compress-weight out"

    @property
    def can_encode_cache(self) -> bool:
        """Whether a codec takes keys and values of every layer."""
        return (None, 4) in self.coded

    def shape_under(self, policy: Policy) -> ModelShape:
        """What the engine's planner needs under `policy`'s compression; `ConfigError` where no codec takes it."""
        coded = self.coded.get((policy.compress_weight, policy.compress_cache))
        if (policy.compress_weight, None) not in self.coded:
            raise ConfigError(self.not_encoded(policy.compress_weight))
        if coded is None:
            raise ConfigError(
                f"compress-cache: no codec takes this model's keys and values in {policy.compress_cache} bits"
            )
        return coded.shape

    @classmethod
    def of(cls, model: CausalModel | ModelSizes) -> ModelSizes:
        """The sizes of a built model."""
        if isinstance(model, ModelSizes):
            return model
        from engine.cache.encodable import unencodable_layer

        lossless: tuple[WeightCodes, ...] = ("lossless",) if str(model.dtype) == "torch.bfloat16" else ()
        weight_codes = (None,) if model.packed else (*_BITS, *lossless)
        cache_bits = _BITS if unencodable_layer(model.kv_shapes) is None else (None,)
        widths = sum(shape.key_dim + shape.value_dim for shape in model.kv_shapes)
        config = model.config.get_text_config()
        is_windowed = getattr(config, "sliding_window", None) is not None
        return cls(
            layer_parameters=_active_parameters(model),
            head_parameters=model.vocab_size * model.hidden_size,
            attention_width=0 if is_windowed else count_of(config, "num_attention_heads") * widths,
            hidden_row_bytes=model.hidden_size * model.hidden_dtype.itemsize,
            num_layers=len(model.layers),
            head="embedding" if model.is_tied else "head",
            coded={(weight, cache): _coded(model, weight, cache) for weight in weight_codes for cache in cache_bits},
        )

    def placed(self, placed: Mapping[str, Mapping[Tier, int]], policy: Policy) -> Sizes:
        """Sizes of the model whose units lie as `placed` says (bytes by tier), under `policy`'s compression."""
        coded = self.coded[policy.compress_weight, policy.compress_cache]
        swept = [tiers for name, tiers in placed.items() if name.startswith(_LAYER) or name == self.head]
        return Sizes(
            layer_parameters=self.layer_parameters,
            head_parameters=self.head_parameters,
            attention_width=self.attention_width,
            sweep_bytes=sum(sum(tiers.values()) for tiers in swept),
            streamed_bytes=sum(tiers["host"] + tiers["disk"] for tiers in swept),
            disk_bytes=sum(tiers["disk"] for tiers in swept),
            cache_row_bytes=coded.row_bytes["host"],
            device_cache_row_bytes=coded.row_bytes["device"],
            expanded_bytes=coded.expanded_bytes,
            expert_bytes=coded.expert_bytes,
            hidden_row_bytes=self.hidden_row_bytes,
            num_layers=self.num_layers,
            state_bytes=coded.shape.state_bytes,
        )

    def as_mapping(self) -> dict[str, Any]:
        """What `from_mapping` reads back; units that follow each other and are as large stand together."""
        numbers = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "coded"}
        return {**numbers, "coded": [[*bits, _packed(coded)] for bits, coded in self.coded.items()]}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> ModelSizes:
        """The sizes that `as_mapping` wrote."""
        coded = {(weight, cache): _unpacked(each) for weight, cache, each in mapping["coded"]}
        return cls(**{**mapping, "coded": coded})


def shipped_sizes(shape: str, dtype: str) -> ModelSizes | None:
    """Sizes of a named shape in a number format of 16 bits; None where none are shipped."""
    if dtype not in ("float16", "bfloat16"):
        return None
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs" / "shapes", package.parent / "configs" / "shapes"):
        file = folder / f"{shape}.json"
        if file.is_file():
            found = ModelSizes.from_mapping(json.loads(file.read_text(encoding="utf-8")))
            codes = {bits: each for bits, each in found.coded.items() if dtype == "bfloat16" or bits[0] != "lossless"}
            return replace(found, coded=codes)
    return None


def _active_parameters(model: CausalModel) -> int:
    """Matrix elements of all layers that a token is multiplied with."""
    config = model.config.get_text_config()
    num_experts = count_of(config, *_EXPERT_KEYS)
    routed = (count_of(config, "num_experts_per_tok") or 1) / (num_experts or 1)
    active = 0.0
    for unit in model.units:
        for name in unit.owners if unit.name.startswith(_LAYER) else ():
            shape = model.state[name].shape
            if len(shape) > 1:  # a bias is added
                is_expert = num_experts > 0 and len(shape) == 3 and shape[0] == num_experts
                active += shape.numel() * (routed if is_expert else 1)
    return round(active)


def _coded(model: CausalModel, weight: WeightCodes, cache: Bits) -> Coded:
    from engine.cache.tables import cache_row_bytes
    from engine.kernels.codec import codec_of
    from engine.kernels.weight_codes.named import weight_codec_of
    from engine.weights.stored_form import encoded_names, shape_of, stack_names, stored_sizes, whole_sizes

    codec = weight_codec_of(weight)
    expanded = [unit for unit in model.units if encoded_names(model, unit, codec)]
    experts = [whole_sizes(model, unit)[name] for unit in expanded for name in stack_names(model, unit, codec)]
    return Coded(
        stored={unit.name: sum(stored_sizes(model, unit, codec).values()) for unit in model.units if unit.owners},
        row_bytes=cache_row_bytes(model.kv_shapes, model.dtype, codec_of(cache)),
        expanded_bytes=sum(sum(whole_sizes(model, unit).values()) for unit in expanded),
        expert_bytes=sum(experts),
        shape=shape_of(model, codec, codec_of(cache)),
    )


def _packed(coded: Coded) -> dict[str, Any]:
    """Layers of one size that follow each other are written as the first one's name, their number and that size."""
    found, runs = asdict(coded), list[list[Any]]()
    for name, size in coded.stored.items():
        if runs and name.startswith(_LAYER) and runs[-1][0].startswith(_LAYER) and runs[-1][2] == size:
            runs[-1][1] += 1
        else:
            runs.append([name, 1, size])
    found["stored"] = runs
    found["shape"]["unit_bytes"] = [[size, len(list(same))] for size, same in groupby(coded.shape.unit_bytes)]
    return found


def _unpacked(mapping: Mapping[str, Any]) -> Coded:
    stored: dict[str, int] = {}
    for name, count, size in mapping["stored"]:
        first = int(name.removeprefix(_LAYER)) if name.startswith(_LAYER) else 0
        names = [f"{_LAYER}{first + at}" for at in range(count)] if name.startswith(_LAYER) else [name]
        stored |= dict.fromkeys(names, size)
    units = tuple(size for size, count in mapping["shape"]["unit_bytes"] for _ in range(count))
    shape = ModelShape(**{**mapping["shape"], "unit_bytes": units})
    return Coded(**{**mapping, "stored": stored, "shape": shape})


def sizes_of(engine: Engine | RemoteEngine) -> Sizes:
    """Sizes of an open engine's model as it is placed; for one in another process the model is built here, too."""
    from engine.workers.remote_engine import RemoteEngine

    if not isinstance(engine, RemoteEngine):
        return sizes_of_model(engine.parts.model, engine.parts.weights.placed_bytes(), engine.policy)
    import torch

    from engine.model.causal_model import CausalModel

    opened = engine.opened
    model = CausalModel(Path(opened.path), getattr(torch, opened.dtype), torch.device("cpu"))
    return sizes_of_model(model, opened.placed, engine.policy)


def sizes_of_model(model: CausalModel | ModelSizes, placed: Mapping[str, Mapping[Tier, int]], policy: Policy) -> Sizes:
    """Sizes of a model whose units lie as `placed` says (bytes by tier), under `policy`'s compression."""
    return ModelSizes.of(model).placed(placed, policy)
