"""Which parameters of a unit are stored encoded or packed, and the resulting sizes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from engine.checkpoint.config import count_of
from engine.kernels.codec import Codec
from engine.kernels.weight_codes.weight_codec import WeightCodec
from engine.memory import accelerator
from engine.memory.layout import align
from engine.model.causal_model import CausalModel
from engine.model.experts.interface import matrix_names
from engine.model.unit import Unit
from engine.planning.model_shape import ModelShape

_CODED_PART = 0.01
"""The smallest share of a unit's numbers that makes a parameter worth encoding; routers and norms are smaller, and
stay exact."""
GROUP_BYTES = 256 << 20
"""The most bytes of experts that are decoded at a time; a single expert may take more."""
_PACKED_WORKING_PART = 0.5
"""Like `WeightCodec.working_part`, for packed matrices."""
_GAPS = 1 << 10
"""The most bytes of gaps between the parts of experts in a slot."""
_SCORE_COPIES = 3
"""The number of float32 copies of scores, position biases and weights in an attention that transformers computes
eagerly."""


def large_matrices(model: CausalModel, unit: Unit) -> frozenset[str]:
    """The parameters of a unit that a codec may encode: large matrices of a layer, and of a head that is not tied."""
    if not unit.name.startswith(("layer.", "head")):
        return frozenset()
    shapes = {name: model.state[name].shape for name in unit.owners}
    least = _CODED_PART * sum(shape.numel() for shape in shapes.values())
    return frozenset(name for name, shape in shapes.items() if len(shape) > 1 and shape.numel() >= least)


def coded_names(model: CausalModel, unit: Unit, codec: WeightCodec) -> frozenset[str]:
    """The parameters of a unit that a codec encodes."""
    if codec.rounds and not unit.name.startswith("layer."):
        return frozenset()
    return frozenset(name for name in large_matrices(model, unit) if codec.takes(name, model.state[name]))


def encoded_names(model: CausalModel, unit: Unit, codec: WeightCodec | None) -> frozenset[str]:
    """The parameters of a unit that are stored encoded, by the codec or as packed in the checkpoint."""
    packed = frozenset(name for name in unit.owners if name in model.packed)
    return packed or (frozenset() if codec is None else coded_names(model, unit, codec))


def stack_names(model: CausalModel, unit: Unit, codec: WeightCodec | None) -> frozenset[str]:
    """The experts of a unit that are stored encoded, and may be decoded some at a time."""
    return encoded_names(model, unit, codec) & model.expert_matrices


def experts_at_once(like: torch.Tensor) -> int:
    """The number of matrices of experts, of a parameter like this, that are decoded at a time."""
    return max(1, min(len(like), GROUP_BYTES // like[0].nbytes))


def group_bytes(model: CausalModel, names: Iterable[str]) -> int:
    """The most bytes of experts that are decoded at a time, over these parameters."""
    likes = [model.state[name] for name in names]
    return max((experts_at_once(like) * like[0].nbytes for like in likes), default=0)


def stored_sizes(model: CausalModel, unit: Unit, codec: WeightCodec | None) -> dict[str, int]:
    """The stored bytes of each parameter of a unit."""
    sizes = whole_sizes(model, unit)
    for name in encoded_names(model, unit, codec):
        like = model.state[name]
        if name in model.packed:
            sizes[name] = model.packed[name].num_bytes
        elif codec is not None:
            sizes[name] = codec.num_weight_bytes(like)
    return sizes


def whole_sizes(model: CausalModel, unit: Unit) -> dict[str, int]:
    """The bytes of each parameter of a unit in its computed form."""
    return {name: model.state[name].numel() * model.state[name].element_size() for name in unit.owners}


def least_expanded_bytes(model: CausalModel, unit: Unit, codec: WeightCodec | None) -> int:
    """The bytes of an encoded unit in its computed form where its experts are decoded some at a time."""
    stacks = stack_names(model, unit, codec)
    others = sum(size for name, size in whole_sizes(model, unit).items() if name not in stacks)
    return others + group_bytes(model, stacks)


def apart_bytes(model: CausalModel, unit: Unit, codec: WeightCodec | None) -> int:
    """The most stored bytes of a unit that pass through a slot at once, with experts separate, some at a time."""
    sizes, stacks = stored_sizes(model, unit, codec), stack_names(model, unit, codec)
    likes = {name: model.state[name] for name in stacks}
    groups = [sizes[name] * experts_at_once(like) // len(like) for name, like in likes.items()]
    return max(sum(align(size) for name, size in sizes.items() if name not in stacks), *groups, 0) + _GAPS


def _choice_width(model: CausalModel, names: Iterable[str], *, by_torch: bool) -> int:
    """The most elements per row and chosen expert that our function holds, for these parameters; else 0."""
    owners = {name: module for unit in model.units for name, (module, _) in unit.owners.items()}
    widest = 0
    for name in names:
        module, hidden = owners[name], model.hidden_size
        first, second = (model.state[f"{name.rpartition('.')[0]}.{each}"] for each in matrix_names(module))
        between, inner = first[0].numel() // hidden, second[0].numel() // hidden
        if model.dtype.itemsize == 2 and module.__dict__["gating"] is not None and not by_torch:
            # By our kernels: the row behind the gate, and the row of the result. Nothing is gathered into memory.
            widest = max(widest, inner + hidden)
        else:
            # By torch: what is gathered, multiplied; then up to five rows of a gate (GPT-OSS's) beside that; then the
            # results in the order of tokens, and those weighted, in 32 bits.
            widest = max(widest, hidden + between, between + 5 * inner, 3 * hidden)
    return widest


def _work_row_bytes(model: CausalModel, *, by_torch: bool) -> int:
    """The approximate bytes of one row's temporaries in a layer, with experts by torch's functions or our kernels."""
    config = model.config.get_text_config()
    inner = count_of(config, "intermediate_size", "ffn_dim", "n_inner") or 4 * model.hidden_size
    choices = count_of(config, "num_experts_per_tok") or 1
    widest = max(model.kv_shapes, key=lambda shape: shape.width)
    attention = 2 * _num_heads(model) * (2 * widest.key_dim + 2 * widest.value_dim)
    if model.expert_matrices:
        layers = (unit.owners for unit in model.units if unit.name.startswith("layer."))
        matrices = [shape for names in layers for name in names if len(shape := model.state[name].shape) == 2]
        # What a config tells of layers without experts may be of none of them.
        feedforward = 3 * min(inner, max(max(shape) for shape in matrices))
        feedforward += choices * _choice_width(model, model.expert_matrices, by_torch=by_torch)
        # They are not held at once; other attention than a plain softmax has scores besides.
        is_flat = model.is_plain and widest.key_dim == widest.value_dim
        both = max(feedforward, attention) if is_flat else feedforward + attention
    else:
        both = 3 * inner * choices + attention
    mixing = max((mixer.work_row_bytes for mixer in model.mixers.values()), default=0)
    item = model.dtype.itemsize
    return max(item * (6 * model.hidden_size + both), 4 * item * model.hidden_size + mixing)


def _num_heads(model: CausalModel) -> int:
    """The number of attention heads; 0 for a model without."""
    return count_of(model.config.get_text_config(), "num_attention_heads") or 0


def shape_of(model: CausalModel, codec: WeightCodec | None = None, cache_codec: Codec | None = None) -> ModelShape:
    """The sizes that the planner needs, with weights stored by `codec` and keys and values by `cache_codec`."""
    config = model.config.get_text_config()
    sizes = {unit.name: sum(stored_sizes(model, unit, codec).values()) for unit in model.units}
    coded = [unit for unit in model.units if encoded_names(model, unit, codec)]
    whole = {unit.name: sum(whole_sizes(model, unit).values()) for unit in coded}
    stacks = [name for unit in coded for name in stack_names(model, unit, codec)]
    least = [least_expanded_bytes(model, unit, codec) for unit in coded]
    working = _PACKED_WORKING_PART if codec is None else codec.working_part
    layers = tuple(size for name, size in sizes.items() if name.startswith("layer."))
    head = sizes["embedding"] if model.is_tied else sizes["head"]
    states = [shape.num_bytes for shape in model.state_shapes if shape is not None]
    widest = max(model.kv_shapes, key=lambda shape: shape.width)
    item = model.dtype.itemsize
    # Sizes that are found out on the CPU are of use for accelerators, too.
    by_torch = model.device.type != "cpu" and not accelerator.runs_triton(model.device)
    # As it is, normed, beside the others', as their sum, and behind a shared expert.
    waiting = 5 * model.hidden_size + (count_of(config, "num_experts_per_tok") or 1) * _choice_width(
        model, stacks, by_torch=by_torch
    )
    return ModelShape(
        unit_bytes=(*layers, head),
        expanded_bytes=round(max(whole.values(), default=0) * (1 + working)),
        least_expanded_bytes=round(max(least, default=0) * (1 + working)),
        stored_part=1.0 if not whole else sum(sizes[name] for name in whole) / sum(whole.values()),
        embedding_bytes=0 if model.is_tied else sizes["embedding"],
        outer_bytes=sizes["outer"],
        cache_row_bytes=sum(shape.width for shape in model.kv_shapes) * item,
        cache_layer_row_bytes=widest.width * item,
        coded_layer_row_bytes=0 if cache_codec is None else cache_codec.row_bytes(widest.width),
        state_bytes=sum(states),
        state_layer_bytes=max(states, default=0),
        continues=model.continues,
        hidden_row_bytes=model.hidden_size * model.hidden_dtype.itemsize,
        handed_row_bytes=model.sweeping.handed_row_bytes,
        is_padded=model.is_padded,
        score_bytes=_SCORE_COPIES * _num_heads(model) * 4 if model.is_padded else 0,
        is_plain=model.is_plain,
        reads_in_place=model.reads_in_place,
        apart_bytes=max(
            head, *(apart_bytes(model, unit, codec) for unit in model.units if unit.name.startswith("layer."))
        )
        if stacks
        else 0,
        waiting_row_bytes=item * waiting if stacks else 0,
        work_row_bytes=_work_row_bytes(model, by_torch=by_torch),
        cpu_work_row_bytes=_work_row_bytes(model, by_torch=True) if model.expert_matrices else 0,
    )
