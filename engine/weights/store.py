"""Weights on their tiers: the location of every parameter, and how it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from engine.checkpoint.identity.weight_digest import WeightDigest
from engine.checkpoint.opened_weights import OpenedWeights
from engine.kernels.weight_codes.weight_codec import WeightCodec
from engine.member import Member
from engine.memory.arena import Arena
from engine.memory.disk.io import wait_for
from engine.memory.layout import align
from engine.memory.tiers import Tier
from engine.model.causal_model import CausalModel
from engine.policy import Share
from engine.weights.members.arrivals import Arrivals
from engine.weights.members.placing import place_unit, shared_weights
from engine.weights.placed_unit import Place, PlacedUnit

_CHUNK_ELEMENTS = 16 << 20
_CONVERTED_ELEMENTS = 1 << 20
"""The most numbers converted at once on their way to the disk, since conversion takes memory."""


class WeightStore:
    """Places a model's parameters by percents, and receives their values.

    They may still be arriving while the first sweep runs: readers of a unit wait until it is complete. With a codec,
    the large parameters of the layers are stored encoded. The disk part of a parameter stays in the checkpoint's own
    files where its bytes are the same, else it is in a file for each unit.
    """

    def __init__(
        self,
        model: CausalModel,
        share: Share,
        arena: Arena,
        *,
        codec: WeightCodec | None = None,
        member: Member | None = None,
        expands_whole: bool = True,
    ) -> None:
        """member: which of several engines that share the weights. expands_whole: decode experts with their unit."""
        self.model = model
        self.member = member
        self.arena = arena
        self.codec = codec
        self._device = arena.device
        self.placed: dict[str, PlacedUnit] = {}
        """The units that have parameters, by name, in the order of the sweep."""
        for unit in model.units:
            if unit.owners:
                self.placed[unit.name] = place_unit(
                    model, unit, share, arena, codec=codec, member=member, expands_whole=expands_whole
                )
        self._extent_of = {
            extent.name: (placed, extent) for placed in self.placed.values() for extent in placed.extents
        }
        shared = None if member is None else shared_weights(self.placed, member, arena.device)
        self.arrivals = Arrivals(self.placed, arena, shared)
        """Which units are complete, and which process loads what."""
        self.source: OpenedWeights | None = None
        """The checkpoint's files, while they are read."""
        self.digest: WeightDigest | None = None
        """The digest of the checkpoint's files."""

    def placed_bytes(self) -> dict[str, dict[Tier, int]]:
        """The bytes of each unit on each tier."""
        return {
            name: {tier: end - first for tier, first, end in placed.tiers()} for name, placed in self.placed.items()
        }

    @property
    def adopted_bytes(self) -> int:
        """The bytes on disk that are read from the checkpoint itself."""
        places = [place for placed in self.placed.values() for place in placed.places.values()]
        return sum(place.end - place.first for place in places if place.is_adopted)

    @property
    def has_codes(self) -> bool:
        """Whether the codec encodes any parameter."""
        return self.codec is not None and any(placed.coded for placed in self.placed.values())

    @property
    def has_rounded(self) -> bool:
        """Whether the codec encodes any parameter with loss."""
        return self.has_codes and self.codec is not None and self.codec.rounds

    @property
    def unit_names(self) -> list[str]:
        """The units that have parameters, in the order of the sweep."""
        return list(self.placed)

    def stored_form(self, unit: str) -> tuple[str, int]:
        """The form of a unit's stored bytes, as JSON, and their number: the same wherever they are placed."""
        placed, state = self.placed[unit], self.model.state
        layout = {
            each.name: [each.first, each.end, str(state[each.name].dtype), each.name in placed.coded]
            for each in placed.extents
        }
        return json.dumps(layout), placed.num_bytes

    def stored_bytes(self, unit: str, first: int, end: int) -> torch.Tensor:
        """The bytes of a complete unit, from `first` to `end`, in host memory; they may be a view.

        No engine has all bytes of a unit whose parts are gathered.
        """
        placed = self.placed[unit]
        pieces: list[torch.Tensor] = []
        for tier, begin, stop in placed.tiers():
            low, high = max(first, begin), min(end, stop)
            if low < high and tier == "disk":
                read = torch.zeros(high - low, dtype=torch.uint8)  # what lies between parameters is on no disk
                wait_for(self.arena.io.read(placed.disk_spans(low, high), read))
                pieces.append(read)
            elif low < high:
                pieces.append(placed.parts[tier][low - begin : high - begin].cpu())
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def put_unit(self, unit: str, stored: torch.Tensor) -> None:
        """Copy all bytes of a unit, in the form of `stored_bytes`, to their places; this completes its parameters."""
        placed = self.placed[unit]
        self._claim_host(placed)
        for tier, first, end in placed.tiers():
            if tier != "disk" and tier in placed.brings:
                placed.parts[tier].copy_(stored[first:end])
        self._claim(placed)
        for place in placed.places.values() if "disk" in placed.brings else ():
            if not place.is_adopted:  # the checkpoint holds it
                self._write_to_disk(placed, place.first, stored[place.first : place.end], torch.uint8)
        for name in placed.unit.owners:
            self.arrive(name)

    def put(self, name: str, tensor: torch.Tensor, first_element: int = 0) -> None:
        """Copy a parameter, or consecutive elements of it, to its place, in the model's dtype or encoded."""
        placed, extent = self._extent_of[name]
        dtype = self.model.state[name].dtype
        source = tensor.reshape(-1)
        self._claim_host(placed)
        if name in placed.coded:
            assert self.codec is not None
            like = self.model.state[name]
            for place, part in self.codec.encoded(name, like, first_element, source, self._device):
                self._write(placed, extent.first + place, part, torch.uint8)
        else:
            self._write(placed, extent.first + first_element * dtype.itemsize, source, dtype)

    def put_buffer(self, name: str, tensor: torch.Tensor) -> None:
        """Fill a persistent buffer of the model."""
        self.model.put_buffer(name, tensor)

    def put_packed(self, name: str, source: str, tensor: torch.Tensor) -> None:
        """Copy a part of a packed parameter, as stored in the checkpoint, to its place."""
        placed, extent = self._extent_of[name]
        self._claim_host(placed)
        stored = tensor.contiguous().reshape(-1).view(torch.uint8)
        self._write(placed, extent.first + self.model.packed[name].first_byte(source), stored, torch.uint8)

    def _claim_host(self, placed: PlacedUnit) -> None:
        self.arrivals.begin(placed)
        if "host" not in placed.parts:  # page-locking takes its time: others are read from disk meanwhile
            placed.parts["host"] = self.arena.empty(placed.split.host, "host")

    def put_stored(self, name: str, stored: torch.Tensor, first: int) -> None:
        """Copy stored bytes uint8 of an encoded parameter, on the host, from byte `first` on, to their places."""
        placed, extent = self._extent_of[name]
        self._claim_host(placed)
        self._write(placed, extent.first + first, stored, torch.uint8)

    def codec_of(self, name: str) -> WeightCodec | None:
        """The codec of a parameter; None if it is not encoded."""
        return self.codec if name in self._extent_of[name][0].coded else None

    def _write(self, placed: PlacedUnit, begin: int, source: torch.Tensor, dtype: torch.dtype) -> None:
        """Write numbers of one parameter, as `dtype`, to the unit's stored bytes from `begin` on."""
        for tier, first, end in placed.tiers():
            low, high = max(first, begin), min(end, begin + source.numel() * dtype.itemsize)
            if low >= high or tier not in placed.brings:
                continue
            piece = source[(low - begin) // dtype.itemsize : (high - begin) // dtype.itemsize]
            if tier == "disk":
                self._write_to_disk(placed, low, piece, dtype)
                continue
            target = placed.parts[tier][low - first : high - first].view(dtype)
            for at in range(0, piece.numel(), _CHUNK_ELEMENTS):
                target[at : at + _CHUNK_ELEMENTS].copy_(piece[at : at + _CHUNK_ELEMENTS])

    def _write_to_disk(self, placed: PlacedUnit, first: int, source: torch.Tensor, dtype: torch.dtype) -> None:
        self._claim(placed)
        place = next(place for place in placed.places.values() if place.first <= first < place.end)
        size = _CHUNK_ELEMENTS if source.dtype == dtype else _CONVERTED_ELEMENTS
        for at in range(0, source.numel(), size):
            chunk = source[at : at + size].to("cpu", dtype).contiguous().view(torch.uint8)
            begin = first + at * dtype.itemsize
            self.arena.io.write(place.file, [place.span(begin, begin + chunk.numel(), 0)], chunk)

    def adopt(self, name: str, dtype: torch.dtype, path: Path, first: int) -> int:
        """Leave the disk part of a parameter, if possible, in `path`, which holds it from byte `first` on.

        It is possible where that is a file of the checkpoint, in the file system of `offload-dir`, with the parameter's
        bytes in the form stored here. Returns how many elements, from the parameter's first on, must still be `put`. It
        must be called before anything is put.
        """
        placed, extent = self._extent_of[name]
        like = self.model.state[name]
        (disk,) = (first for tier, first, _ in placed.tiers() if tier == "disk")
        low, end = max(extent.first, disk), min(extent.end, placed.part.end)
        is_same = name not in placed.coded and dtype == like.dtype and low < end
        if not is_same or not self.arena.is_on_same_disk(path):
            return like.numel()
        file = self.arena.opened(path)
        placed.places[name] = Place(low, end, file, first + low - extent.first, True)
        return (low - extent.first) // dtype.itemsize

    def claim_disk(self) -> None:
        """Create the files of disk parts that have not been adopted; `CapacityError` where the disk is full."""
        for placed in self.placed.values():
            self._claim(placed)

    def _claim(self, placed: PlacedUnit) -> None:
        (disk,) = (first for tier, first, _ in placed.tiers() if tier == "disk")
        size, layout = 0, {}
        for extent in placed.extents:
            first, end = max(disk, extent.first), min(extent.end, placed.part.end)
            if first < end and extent.name not in placed.places:
                layout[extent.name] = first, end, size
                size = align(size + end - first)
        if layout:
            file = self.arena.file(size)
            placed.places.update(
                {name: Place(first, end, file, at, False) for name, (first, end, at) in layout.items()}
            )

    def needs(self, name: str) -> bool:
        """Whether this process loads anything of a parameter."""
        placed, extent = self._extent_of[name]
        return placed.needs(extent)

    def arrive(self, name: str) -> None:
        """Note that all of a parameter is in place; its unit may be used as soon as all of them are."""
        placed, _ = self._extent_of[name]
        self.arrivals.begin(placed)
        self.arrivals.arrive(placed, name)

    def give_up(self, fault: BaseException) -> None:
        """End loading: threads that wait for an incomplete unit get `fault`."""
        self.arrivals.give_up(fault)

    def wait(self) -> None:
        """Wait until every parameter is in place; raises the fault that kept one from arriving."""
        for placed in list(self.placed.values()):
            self.wait_for(placed)
        self.check_source()

    @property
    def is_complete(self) -> bool:
        """Whether every parameter is in place; raises the fault that kept one from arriving."""
        return next(self.arrivals.left(), None) is None

    def check_source(self) -> None:
        """Raise `CheckpointError` if the checkpoint was written to while being read; call it after each sweep."""
        if self.source is not None:
            self.source.check()

    def wait_for(self, placed: PlacedUnit) -> None:
        """Wait until a unit is complete; raises the fault that ended loading."""
        self.arrivals.wait_for(placed)

    def close(self) -> None:
        """Release the weights; the arena frees the memory."""
        if self.digest is not None:
            self.digest.close()
        if self.source is not None:
            self.source.close()
        self.arrivals.close()
        for placed in self.placed.values():
            for module, attribute in placed.unit.owners.values():
                module._parameters[attribute] = None
        if self.model.output is not None:
            self.model.output._parameters["weight"] = None
        self.placed.clear()
        self._extent_of.clear()
