"""Compares the parameters with which the device computes with those of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from engine.errors import CheckpointError
from engine.kernels.codec import GROUP, Codec
from engine.kernels.weight_codes.groups import GroupCodes
from engine.model.unit import Unit
from engine.verification.difference import WeightDifference
from engine.weights.store import WeightStore
from engine.weights.unit_values import UnitValues

_CHUNK = 4 << 20
"""The most numbers compared at once, a multiple of `GROUP`."""

Numbers = Callable[[int, int], torch.Tensor]
"""Reads consecutive numbers of a flat parameter, from one index to another."""


class WeightCheck:
    """Compares the numbers with which the device computes with the checkpoint's, unit by unit in sweep order.

    Numbers that are not rounded must equal the checkpoint's, rounded to the model's dtype. Those that `compress-weight`
    rounds must be within the error bound of codes (`Codec.bound`), and packed ones must equal their decoded parts.
    """

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self._model = store.model
        self._units = {unit.name: unit for unit in store.model.units}
        self._table: torch.Tensor | None = None
        self.found: dict[str, WeightDifference] = {}
        """The parameter of each stage ("embedding", "layer N", "head") that is farthest from its expected value."""

    def embedding(self, values: UnitValues) -> None:
        """Check the token embedding, on whatever tiers its rows are, and all parameters outside of layers and head.

        Raises `CheckpointError` for a buffer that differs from the checkpoint's.
        """
        name, outer = self._model.embedding_name, self._units["outer"]
        self._store.wait_for(self._store.placed["embedding"])
        table = values.take(self._units["embedding"])[name]
        dtype = self._model.state[name].dtype

        def stored(first: int, end: int) -> torch.Tensor:
            found = self._store.stored_bytes("embedding", first * dtype.itemsize, end * dtype.itemsize)
            return found.view(dtype)

        self._note("embedding", self._compare(name, stored, table))
        if outer.owners:
            self._bound("embedding", outer, values.take(outer))
        for buffer, value in values.buffers.items():
            ours = self._model.buffer(buffer)
            if not torch.equal(ours, value.to(ours.device, ours.dtype)):
                raise CheckpointError(f"the buffer {buffer} is not what the checkpoint holds; start again")
        self._table = table if self._model.is_tied else None

    def layer(self, index: int, values: UnitValues) -> dict[str, torch.Tensor]:
        """Check a layer whose parameters are bound; returns the checkpoint's."""
        unit = self._units[f"layer.{index}"]
        taken = values.take(unit)
        self._bound(f"layer {index}", unit, taken)
        return taken

    def head(self, values: UnitValues) -> None:
        """Check the head, whose parameters are bound."""
        output, unit = self._model.output, self._units["head"]
        if self._table is not None:
            assert output is not None
            self._tensor("head", self._model.embedding_name, output._parameters["weight"], self._table)
        elif unit.owners:
            self._bound("head", unit, values.take(unit))

    def _bound(self, stage: str, unit: Unit, values: Mapping[str, torch.Tensor]) -> None:
        for name, (module, attribute) in unit.owners.items():
            self._tensor(stage, name, module._parameters[attribute], values[name])

    def _tensor(self, stage: str, name: str, parameter: torch.Tensor | None, value: torch.Tensor) -> None:
        assert parameter is not None
        flat = parameter.detach().view(-1)
        self._note(stage, self._compare(name, lambda first, end: flat[first:end], value))

    def _note(self, stage: str, found: WeightDifference) -> None:
        before = self.found.get(stage)
        if before is None or (found.is_wrong, found.largest) > (before.is_wrong, before.largest):
            self.found[stage] = found

    def _compare(self, name: str, ours: Numbers, value: torch.Tensor) -> WeightDifference:
        like, packed = self._model.state[name], self._model.packed.get(name)
        codec = None if packed is not None else self._store.codec_of(name)
        if packed is not None:
            device = ours(0, 1).device
            whole = torch.empty(like.numel(), dtype=like.dtype, device=device)
            packed.decode(value.to(device), whole)
            value = whole
        flat, largest, is_wrong = value.reshape(-1), 0.0, False
        for first in range(0, like.numel(), _CHUNK):
            one = ours(first, min(first + _CHUNK, like.numel()))
            other = flat[first : first + len(one)].to(one.device, like.dtype)
            if torch.equal(one, other):
                continue
            is_same = (one == other) | (one.isnan() & other.isnan())
            apart = torch.where(is_same, 0.0, (one.float() - other.float()).abs()).nan_to_num(nan=torch.inf)
            is_wrong |= _is_beyond(apart, other, codec.codec) if isinstance(codec, GroupCodes) else bool(apart.any())
            largest = max(largest, float(apart.max()))
        return WeightDifference(parameter=name, largest=largest, is_wrong=is_wrong)


def _is_beyond(apart: torch.Tensor, values: torch.Tensor, codec: Codec) -> bool:
    """Whether any group of numbers differs from `values`, which were encoded, by more than the codec's bound.

    The code of a group that holds a NaN or an infinity has no bound, since its decoded numbers are not finite. So NaNs
    must still be NaNs (0 apart), and numbers that are finite in `values` must have become infinite or NaN.
    """
    groups, distances = values.float().view(-1, GROUP), apart.view(-1, GROUP)
    rounding = torch.finfo(values.dtype).eps * groups.square().sum(dim=-1).sqrt() * 2
    is_near = distances.square().sum(dim=-1).sqrt() <= codec.bound(groups) + rounding
    is_far = distances >= torch.finfo(torch.float32).max  # what an infinite difference is taken for, or more
    is_lost = torch.where(groups.isnan(), distances == 0, is_far | groups.isinf()).all(dim=-1)
    return not bool(torch.where(groups.isfinite().all(dim=-1), is_near, is_lost).all())
