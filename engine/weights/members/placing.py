"""The placement of a unit's bytes, for one engine and for several that share the weights."""

from __future__ import annotations

from typing import Literal

import torch

from engine.kernels.weight_codes.weight_codec import WeightCodec
from engine.member import Member
from engine.memory.arena import Arena
from engine.memory.layout import ALIGNMENT, Part, lay_out, part_bytes, part_of, split_bytes, streamed_from
from engine.memory.tiers import Tier
from engine.model.causal_model import CausalModel
from engine.model.unit import Unit
from engine.policy import Share
from engine.weights.members.host_weights import HostWeights
from engine.weights.placed_unit import PlacedUnit
from engine.weights.stored_form import encoded_names, stack_names, stored_sizes, whole_sizes


def place_unit(
    model: CausalModel,
    unit: Unit,
    share: Share,
    arena: Arena,
    *,
    codec: WeightCodec | None,
    member: Member | None,
    expands_whole: bool,
) -> PlacedUnit:
    """Divide a unit by the percents of `share`, and allocate its memory on the device.

    expands_whole: encoded experts are decoded with the unit, not some at a time. If several engines gather weights,
    each has a part of every layer and of the head, divided by the same percents. The token embedding, whose rows are
    looked up, and the parameters that are needed throughout are kept whole by each engine.
    """
    coded = encoded_names(model, unit, codec)
    stacks = frozenset[str]() if expands_whole else stack_names(model, unit, codec)
    plain = {name: size for name, size in whole_sizes(model, unit).items() if name not in stacks}
    extents, num_bytes = lay_out(stored_sizes(model, unit, codec))
    row_bytes, gathered = ALIGNMENT, 0
    if unit.name == "embedding":  # cut between rows, which are looked up one by one
        table, num_bytes = model.state[extents[0].name], extents[0].end
        row_bytes = table.shape[1] * table.element_size()
    part = Part(first=0, end=num_bytes)
    if member is not None and member.gather and unit.name not in ("embedding", "outer"):
        part = part_of(num_bytes, member.index, member.count)
        gathered = member.count * part_bytes(num_bytes, member.count)
    split = split_bytes(part.num_bytes, share, row_bytes)
    return PlacedUnit(
        unit=unit,
        extents=extents,
        num_bytes=num_bytes,
        part=part,
        gathered_bytes=gathered,
        split=split,
        parts={"device": arena.empty(0 if _is_shared("device", member, arena.device) else split.device, "device")},
        start=0 if gathered else streamed_from(extents, split),
        coded=coded,
        stacks=stacks,
        expanded=lay_out(plain)[0] if coded else [],
    )


def shared_tiers(device: torch.device) -> tuple[Literal["device", "host"], ...]:
    """The tiers whose bytes all members can read: on the CPU, the device's too."""
    return ("device", "host") if device.type == "cpu" else ("host",)


def _is_shared(tier: Tier, member: Member | None, device: torch.device) -> bool:
    return member is not None and not member.gather and tier in shared_tiers(device)


def shared_weights(placed: dict[str, PlacedUnit], member: Member, device: torch.device) -> HostWeights | None:
    """The memory that all members read; None if there is none."""
    sizes = {
        name: sum(end - first for tier, first, end in each.tiers() if _is_shared(tier, member, device))
        for name, each in placed.items()
    }
    sizes = {name: size for name, size in sizes.items() if size}
    return HostWeights(member, sizes) if sizes else None
