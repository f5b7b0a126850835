"""Weights on their tiers, and their way through the device slots, layer by layer."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.kernels.codec import GROUP, Codec
from engine.memory import accelerator
from engine.memory.arena import Arena
from engine.memory.disk.file import BLOCK
from engine.memory.disk.io import wait_for
from engine.memory.layout import Extent, align, lay_out, split_bytes, streamed_from
from engine.memory.tiers import Tier
from engine.model.causal_model import CausalModel
from engine.model.unit import Unit
from engine.planning.limits import READ_AHEAD_BYTES
from engine.policy import Share
from engine.weights.placed_unit import Place, PlacedUnit
from engine.weights.stored_form import encoded_names, stored_sizes, whole_sizes
from engine.weights.sweep_reader import SweepReader
from engine.weights.token_embedding import TokenEmbedding

NUM_SLOTS = 2
_STAGE_BYTES = 64 << 20
_CHUNK_ELEMENTS = 16 << 20
_CONVERTED_ELEMENTS = 1 << 20
"""Converted at once on their way to the disk: it takes memory."""
_CODED_CHUNK_ELEMENTS = 2 << 20
"""Encoded at once: it takes about 30 bytes for each, on the device."""


_Binding = tuple[nn.Module, str, nn.Parameter]
"""A module, the name of a parameter of its, and the parameter."""


@dataclass(eq=False)
class _Slot:
    """Device memory that layers take turns in."""

    index: int
    memory: torch.Tensor
    content: PlacedUnit | None = None
    arrival: Future[Any] | None = None
    in_use: bool = False
    released: Any = field(default=None)
    """Event of the last computation that reads the slot."""


class WeightStore:
    """Places a model's parameters by percents and brings each unit to the device when its turn comes.

    They may still be arriving while the first sweep runs: it waits at each unit until that is complete. Parameters are
    views: of the device part where they lie there wholly, else of the slot that their unit passes
    through. Resident bytes of a parameter that is cut by the border are copied within the device.

    With a codec, the large parameters of the layers are kept and moved encoded, and a layer is expanded once in a
    sweep, into device memory that all layers use in turn; its slot is free for the next but one from then on.

    What is on disk lies in the checkpoint's own files where its bytes are those, else in a file for each unit. It is
    read in the order of the sweep, ahead of it as far as `read_ahead_bytes` of staging memory reach.
    """

    def __init__(
        self,
        model: CausalModel,
        share: Share,
        arena: Arena,
        *,
        codec: Codec | None = None,
        overlap: bool = True,
        read_ahead_bytes: int = READ_AHEAD_BYTES,
    ) -> None:
        self.model = model
        self._codec = codec
        self._arena = arena
        self._device = arena.device
        self._overlap = overlap
        self._placed: dict[str, PlacedUnit] = {}
        for unit in model.units:
            if unit.owners:
                self._placed[unit.name] = self._place(unit, share)
        self._extent_of = {
            extent.name: (placed, extent) for placed in self._placed.values() for extent in placed.extents
        }
        last = self._placed["embedding"] if model.is_tied else self._placed["head"]
        order = [*(self._placed[f"layer.{index}"] for index in range(len(model.layers))), last]
        self._by_step = order
        self._streamed = [placed for placed in order if placed.num_streamed]
        size = max((placed.num_streamed for placed in self._streamed), default=0)
        count = min(NUM_SLOTS, len(self._streamed))
        self._slots = [_Slot(index, arena.empty(size, "device")) for index in range(count)]
        self._next = {id(a): b for a, b in pairwise([*self._streamed, *self._streamed[:1]])}
        self._reader: SweepReader | None = None
        self._number = {id(placed): number for number, placed in enumerate(self._streamed)}
        if any(placed.split.disk for placed in self._streamed):
            streamed, staging = self._streamed, arena.staging(max(read_ahead_bytes, 2 * BLOCK))
            self._reader = SweepReader(
                arena.io,
                staging,
                [placed.disk_spans for placed in streamed],
                lambda unit: streamed[unit].complete.is_set() and not streamed[unit].missing,
                ahead=overlap and len(streamed) > NUM_SLOTS,  # else they stay in the slots
            )
        self._expanded = arena.empty(max((p.expanded[-1].end for p in order if p.coded), default=0), "device")
        self._outer = arena.empty(self._placed["outer"].num_streamed if "outer" in self._placed else 0, "device")
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="flexgen-fetch")
        self._copy_stream = accelerator.new_stream(self._device)
        self._stage: list[tuple[torch.Tensor, Any]] = []
        self._fault: BaseException | None = None
        self._views: dict[int, list[list[_Binding]]] = {}
        """Of a streamed unit, by slot: an odd number of units visits both slots in turn."""
        self._bind()
        self._embedding = TokenEmbedding(model, self._placed["embedding"], arena, self._wait_for)

    def placed_bytes(self) -> dict[str, dict[Tier, int]]:
        """Bytes of each unit on each tier."""
        return {
            name: {tier: end - first for tier, first, end in placed.split.parts()}
            for name, placed in self._placed.items()
        }

    @property
    def adopted_bytes(self) -> int:
        """Bytes on disk that are read from the checkpoint itself."""
        places = [place for placed in self._placed.values() for place in placed.places.values()]
        return sum(place.end - place.first for place in places if place.is_adopted)

    @property
    def has_codes(self) -> bool:
        """Whether the codec takes any parameter."""
        return self._codec is not None and any(placed.coded for placed in self._placed.values())

    @property
    def unit_names(self) -> list[str]:
        """Units that have parameters, in the order of the sweep."""
        return list(self._placed)

    def stored_form(self, unit: str) -> tuple[str, int]:
        """What a unit's stored bytes mean, as JSON, and how many they are: the same wherever they are placed."""
        placed, state = self._placed[unit], self.model.state
        layout = {
            each.name: [each.first, each.end, str(state[each.name].dtype), each.name in placed.coded]
            for each in placed.extents
        }
        return json.dumps(layout), placed.split.num_bytes

    def stored_bytes(self, unit: str, first: int, end: int) -> torch.Tensor:
        """Bytes of a unit that is complete, from `first` to `end`, in host memory; they may be a view."""
        placed = self._placed[unit]
        pieces: list[torch.Tensor] = []
        for tier, begin, stop in placed.split.parts():
            low, high = max(first, begin), min(end, stop)
            if low < high and tier == "disk":
                read = torch.zeros(high - low, dtype=torch.uint8)  # what lies between parameters is on no disk
                wait_for(self._arena.io.read(placed.disk_spans(low, high), read))
                pieces.append(read)
            elif low < high:
                pieces.append(placed.parts[tier][low - begin : high - begin].cpu())
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def put_unit(self, unit: str, stored: torch.Tensor) -> None:
        """Copy all bytes of a unit, as `stored_bytes` gives them, to their places; its parameters arrive by that."""
        placed = self._placed[unit]
        self._claim_host(placed)
        for tier, first, end in placed.split.parts():
            if tier != "disk":
                placed.parts[tier].copy_(stored[first:end])
        self._claim(placed)
        for place in placed.places.values():
            if not place.is_adopted:  # the checkpoint holds it
                self._write_to_disk(placed, place.first, stored[place.first : place.end], torch.uint8)
        for name in placed.unit.owners:
            self.arrive(name)

    def _place(self, unit: Unit, share: Share) -> PlacedUnit:
        state = self.model.state
        coded = encoded_names(self.model, unit, self._codec)
        extents, num_bytes = lay_out(stored_sizes(self.model, unit, self._codec))
        if unit.name == "embedding":  # cut between rows, which are looked up one by one
            table = state[extents[0].name]
            num_bytes = extents[0].end
            split = split_bytes(num_bytes, share, table.shape[1] * table.element_size())
        else:
            split = split_bytes(num_bytes, share)
        parts: dict[Tier, torch.Tensor] = {"device": self._arena.empty(split.device, "device")}
        expanded = lay_out(whole_sizes(self.model, unit))[0] if coded else []
        return PlacedUnit(unit, extents, split, parts, streamed_from(extents, split), set(unit.owners), coded, expanded)

    def _bind(self) -> None:
        for placed in self._placed.values():
            if placed.coded:
                memory = [self._expanded[extent.first : extent.end] for extent in placed.expanded]
                _set([self._binding(placed, e, m) for e, m in zip(placed.expanded, memory, strict=True)])
            elif placed.unit.name == "outer" or (placed.unit.name != "embedding" and not placed.num_streamed):
                _set(self._bindings(placed, self._outer))
            elif placed.unit.name != "embedding":
                self._views[id(placed)] = [self._bindings(placed, slot.memory) for slot in self._slots]
                _set(self._views[id(placed)][0])
        table = self._placed["embedding"]
        if table.num_streamed == 0:
            _set(self._bindings(table, self._outer))
        if self.model.is_tied:
            output = self.model.output
            assert output is not None
            memories = [slot.memory for slot in self._slots] if table.num_streamed else [self._outer]
            heads: list[list[_Binding]] = [
                [(output, "weight", _parameter(self._view(table, table.extents[0], memory)))] for memory in memories
            ]
            _set(heads[0])
            if table.num_streamed:
                self._views[id(table)] = heads

    def _bindings(self, placed: PlacedUnit, slot: torch.Tensor) -> list[_Binding]:
        return [self._binding(placed, extent, self._bytes(placed, extent, slot)) for extent in placed.extents]

    def _binding(self, placed: PlacedUnit, extent: Extent, memory: torch.Tensor) -> _Binding:
        like = self.model.state[extent.name]
        return (*placed.unit.owners[extent.name], _parameter(memory.view(like.dtype).view(like.shape)))

    def _view(self, placed: PlacedUnit, extent: Extent, slot: torch.Tensor) -> torch.Tensor:
        like = self.model.state[extent.name]
        return self._bytes(placed, extent, slot).view(like.dtype).view(like.shape)

    @staticmethod
    def _bytes(placed: PlacedUnit, extent: Extent, slot: torch.Tensor) -> torch.Tensor:
        """A parameter's stored bytes on the device."""
        if extent.end <= placed.split.device:
            return placed.parts["device"][extent.first : extent.end]
        return slot[extent.first - placed.start : extent.end - placed.start]

    def _expand(self, placed: PlacedUnit, slot: torch.Tensor) -> None:
        """Fill the memory that the unit's parameters are views of."""
        for extent, place in zip(placed.extents, placed.expanded, strict=True):
            stored, memory = self._bytes(placed, extent, slot), self._expanded[place.first : place.end]
            if extent.name in placed.coded:
                codec = self.model.packed.get(extent.name) or self._codec
                assert codec is not None
                codec.decode(stored, memory.view(self.model.state[extent.name].dtype))
            else:
                memory.copy_(stored)

    def put(self, name: str, tensor: torch.Tensor, first_element: int = 0) -> None:
        """Copy a parameter, or consecutive elements of it, to its place, in the model's dtype or encoded."""
        placed, extent = self._extent_of[name]
        dtype = self.model.state[name].dtype
        source = tensor.reshape(-1)
        self._claim_host(placed)
        if name in placed.coded:
            self._put_coded(placed, extent, source, first_element, dtype)
        else:
            self._write(placed, extent.first + first_element * dtype.itemsize, source, dtype)

    def put_packed(self, name: str, part: str, tensor: torch.Tensor) -> None:
        """Copy a part of a packed parameter, as the checkpoint has it, to its place."""
        placed, extent = self._extent_of[name]
        self._claim_host(placed)
        stored = tensor.contiguous().reshape(-1).view(torch.uint8)
        self._write(placed, extent.first + self.model.packed[name].first_byte(part), stored, torch.uint8)

    def _claim_host(self, placed: PlacedUnit) -> None:
        if "host" not in placed.parts:  # page-locking takes its time: others are read from disk meanwhile
            placed.parts["host"] = self._arena.empty(placed.split.host, "host")

    def _put_coded(
        self, placed: PlacedUnit, extent: Extent, source: torch.Tensor, first_element: int, dtype: torch.dtype
    ) -> None:
        assert self._codec is not None
        for at in range(0, source.numel(), _CODED_CHUNK_ELEMENTS):
            values = source[at : at + _CODED_CHUNK_ELEMENTS].to(self._device)
            parts = self._codec.encode(values, dtype)
            self._put_codes(placed, extent, [part.cpu() for part in parts], first_element + at, dtype)

    def put_codes(self, name: str, codes: list[torch.Tensor], first_element: int = 0) -> None:
        """Copy codes, steps and leasts of consecutive elements of a parameter, on the host, to their places."""
        placed, extent = self._extent_of[name]
        self._claim_host(placed)
        self._put_codes(placed, extent, codes, first_element, self.model.state[name].dtype)

    def _put_codes(
        self, placed: PlacedUnit, extent: Extent, parts: list[torch.Tensor], first_element: int, dtype: torch.dtype
    ) -> None:
        assert self._codec is not None
        codes, steps, leasts = parts
        code_bytes, step_bytes = self._codec.part_bytes(self.model.state[extent.name].numel(), dtype)
        self._write(placed, extent.first + self._codec.code_bytes(first_element), codes, torch.uint8)
        place = extent.first + code_bytes + first_element // GROUP * dtype.itemsize
        self._write(placed, place, steps, dtype)
        self._write(placed, place + step_bytes, leasts, dtype)

    def codec_of(self, name: str) -> Codec | None:
        """What a parameter is encoded by; None if it is stored as numbers."""
        return self._codec if name in self._extent_of[name][0].coded else None

    def _write(self, placed: PlacedUnit, begin: int, source: torch.Tensor, dtype: torch.dtype) -> None:
        """Write numbers of one parameter, as `dtype`, to the unit's stored bytes from `begin` on."""
        for tier, first, end in placed.split.parts():
            low, high = max(first, begin), min(end, begin + source.numel() * dtype.itemsize)
            if low >= high:
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
            self._arena.io.write(place.file, [place.span(begin, begin + chunk.numel(), 0)], chunk)

    def adopt(self, name: str, dtype: torch.dtype, path: Path, first: int) -> int:
        """Leave what is placed on disk of a parameter, if it may be, in `path`, which holds it from byte `first` on.

        It may where that is a file of the checkpoint, in the file system of `offload-dir`, with the parameter's bytes
        as they are stored here. Returns how many elements, from the parameter's first on, are still to be `put`. To be
        called before anything is.
        """
        placed, extent = self._extent_of[name]
        like = self.model.state[name]
        low = max(extent.first, placed.split.device + placed.split.host)
        is_same = name not in placed.coded and dtype == like.dtype and low < extent.end
        if not is_same or not self._arena.is_on_same_disk(path):
            return like.numel()
        file = self._arena.opened(path)
        placed.places[name] = Place(low, extent.end, file, first + low - extent.first, True)
        return (low - extent.first) // dtype.itemsize

    def claim_disk(self) -> None:
        """Make the files of everything on disk that has not been adopted; `CapacityError` where they have no room."""
        for placed in self._placed.values():
            self._claim(placed)

    def _claim(self, placed: PlacedUnit) -> None:
        begin, size, layout = placed.split.device + placed.split.host, 0, {}
        for extent in placed.extents:
            if extent.end > begin and extent.name not in placed.places:
                layout[extent.name] = max(begin, extent.first), extent.end, size
                size = align(size + extent.end - max(begin, extent.first))
        if layout:
            file = self._arena.file(size)
            placed.places.update(
                {name: Place(first, end, file, at, False) for name, (first, end, at) in layout.items()}
            )

    def arrive(self, name: str) -> None:
        """Tell that all of a parameter is in place; its unit may be used as soon as that is so of all."""
        placed, _ = self._extent_of[name]
        placed.missing.discard(name)
        if placed.missing:
            return
        if placed.unit.name == "outer":  # it is always needed on the device
            self._copy(placed, self._outer)
        if self._copy_stream is not None:
            accelerator.current_stream(self._device).synchronize()  # other streams read it
        placed.complete.set()

    def give_up(self, fault: BaseException) -> None:
        """Tell that nothing will arrive any more: whoever waits for a unit that is not complete gets `fault`."""
        self._fault = fault
        for placed in self._placed.values():
            placed.complete.set()

    def wait(self) -> None:
        """Return when every parameter is in place; raises the fault that kept one from arriving."""
        for placed in list(self._placed.values()):
            self._wait_for(placed)

    def _wait_for(self, placed: PlacedUnit) -> None:
        placed.complete.wait()
        if placed.missing and self._fault is not None:
            raise self._fault

    def look_up_ahead(self, ids: torch.Tensor) -> None:
        """Start looking up the ids that `look_up` will be called with next, while the device computes."""
        if self._overlap:
            self._embedding.look_up_ahead(ids)

    def look_up(self, ids: torch.Tensor) -> None:
        """Prepare the token embedding for `ids` `[sequences, rows]` (on the host): brings just their rows here."""
        self._embedding.look_up(ids)

    def acquire(self, step: int) -> None:
        """Wait until layer `step` (or, behind the last layer, the head) can compute, and start fetching the next."""
        placed = self._by_step[step]
        if step == 0 and "outer" in self._placed:
            self._wait_for(self._placed["outer"])
        self._wait_for(placed)
        if not placed.num_streamed:
            if placed.coded:
                self._expand(placed, self._outer)
            return
        slot = self._slot_with(placed)
        if slot is None:
            slot = next(slot for slot in self._slots if not slot.in_use)
            self._fetch(placed, slot)
        if not placed.coded:
            _set(self._views[id(placed)][slot.index])
        assert slot.arrival is not None
        arrived = slot.arrival.result()
        if arrived is not None:
            accelerator.current_stream(self._device).wait_event(arrived)
        if placed.coded:
            self._expand(placed, slot.memory)
            self._free(slot)
            self._prefetch(placed)
            self._prefetch(self._next[id(placed)])
            return
        slot.in_use = True
        self._prefetch(placed)

    def release(self, step: int) -> None:
        """Tell that layer `step` has computed; its slot may be filled anew."""
        placed = self._by_step[step]
        slot = self._slot_with(placed)
        if slot is None or placed.coded:
            return
        self._free(slot)
        self._prefetch(placed)

    def _free(self, slot: _Slot) -> None:
        """Let a slot be filled anew, once the computation asked for until now has read it."""
        slot.in_use = False
        if self._copy_stream is not None:
            slot.released = accelerator.current_stream(self._device).record_event()

    def _prefetch(self, placed: PlacedUnit) -> None:
        following = self._next[id(placed)]
        if not self._overlap or self._slot_with(following) is not None:
            return
        slot = next((slot for slot in self._slots if not slot.in_use and slot.content is not placed), None)
        if slot is not None:
            self._fetch(following, slot)

    def _slot_with(self, placed: PlacedUnit) -> _Slot | None:
        return next((slot for slot in self._slots if slot.content is placed), None)

    def _fetch(self, placed: PlacedUnit, slot: _Slot) -> None:
        slot.content = placed
        slot.arrival = self._fetcher.submit(self._fill, placed, slot)

    def _fill(self, placed: PlacedUnit, slot: _Slot) -> Any:
        self._wait_for(placed)
        if self._copy_stream is None:
            self._copy(placed, slot.memory)
            return None
        with accelerator.on_device(self._device), accelerator.on_stream(self._copy_stream, self._device):
            if slot.released is not None:
                self._copy_stream.wait_event(slot.released)
            self._copy(placed, slot.memory)
            return self._copy_stream.record_event()

    def _copy(self, placed: PlacedUnit, target: torch.Tensor) -> None:
        for tier, offset, piece in placed.pieces():
            destination = target[offset : offset + piece.numel()]
            if self._copy_stream is None or tier == "device" or (tier == "host" and self._arena.pinned):
                destination.copy_(piece, non_blocking=True)
            else:
                self._copy_staged(piece, destination)
        if not placed.split.disk:
            return
        if id(placed) not in self._number:
            self._copy_from_disk(placed, target)
            return
        assert self._reader is not None
        for request, blocks in self._reader.take(self._number[id(placed)], self._event):
            for offset, at, size in request.parts:
                blocking = self._copy_stream is None
                target[at : at + size].copy_(blocks[offset : offset + size], non_blocking=not blocking)

    def _copy_from_disk(self, placed: PlacedUnit, target: torch.Tensor) -> None:
        """Bring a unit that does not pass through a slot to the device, once and for all."""
        memory = torch.empty(placed.num_streamed, dtype=torch.uint8)
        spans = placed.disk_spans()
        wait_for(self._arena.io.read(spans, memory))
        for span in spans:
            size = span.end - span.first
            target[span.at : span.at + size].copy_(memory[span.at : span.at + size])

    def _event(self) -> Any:
        """Of what was asked of the stream of copies until now; None where there is none."""
        return None if self._copy_stream is None else accelerator.current_stream(self._device).record_event()

    def _copy_staged(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy pageable or mapped bytes to the device through two page-locked buffers in turn."""
        if not self._stage:
            self._stage = [(accelerator.page_locked(_STAGE_BYTES, dtype=torch.uint8), None) for _ in range(2)]
        for turn, first in enumerate(range(0, source.numel(), _STAGE_BYTES)):
            buffer, copied = self._stage[turn % 2]
            if copied is not None:
                copied.synchronize()
            size = min(_STAGE_BYTES, source.numel() - first)
            buffer[:size].copy_(source[first : first + size])
            target[first : first + size].copy_(buffer[:size], non_blocking=True)
            event = accelerator.current_stream(self._device).record_event()
            self._stage[turn % 2] = buffer, event

    def close(self) -> None:
        """Stop fetching and let go of the weights; the arena frees the memory."""
        self._fetcher.shutdown(wait=True, cancel_futures=True)
        self._embedding.close()
        if self._reader is not None:
            self._reader.close()
        self._reader = None
        for placed in self._placed.values():
            for module, attribute in placed.unit.owners.values():
                module._parameters[attribute] = None
        if self.model.output is not None:
            self.model.output._parameters["weight"] = None
        self._outer = self._expanded = torch.empty(0, dtype=torch.uint8)
        for held in (self._placed, self._extent_of, self._views, self._next):
            held.clear()
        for listed in (self._by_step, self._streamed, self._slots, self._stage):
            listed.clear()


def _parameter(view: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(view, requires_grad=False)


def _set(bindings: list[_Binding]) -> None:
    for module, attribute, parameter in bindings:
        module._parameters[attribute] = parameter
