"""Reads a checkpoint's parameters a unit at a time, independently of the placed weights."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch

from engine.checkpoint.opened_weights import OpenedWeights
from engine.model.causal_model import CausalModel
from engine.model.unit import Unit
from engine.weights.loading import steps_by_unit
from engine.weights.read_ahead import run_steps


class UnitValues:
    """Reads the weight files of a model directory once, in the order of the sweep, without placing anything.

    Parameters come as they are in the files, mapped where names and shapes are the model's, and converted by
    `transformers`' own mapping where not. Packed parameters come in their parts.
    """

    def __init__(self, path: Path, model: CausalModel) -> None:
        """Raises `CheckpointError` as loading does. Nothing is read before `take`."""
        self.model = model
        self.buffers: dict[str, torch.Tensor] = {}
        """The persistent buffers by name."""
        self._values: dict[str, torch.Tensor] = {}
        self._stored: dict[str, torch.Tensor] = {}
        """The stored bytes uint8 of packed parameters."""
        self._arrived: set[str] = set()
        self._source = OpenedWeights(path)
        try:
            by_unit = steps_by_unit(path, self)
            self._source.check_names()
        except BaseException:
            self._source.close()
            raise
        steps = (step for _, step in chain.from_iterable(by_unit.values()))
        self._steps: Iterator[None] = run_steps(steps, lambda span: None)

    def take(self, unit: Unit) -> dict[str, torch.Tensor]:
        """The parameters of a unit on the host, in the dtypes of the files; of packed ones, uint8 of their parts.

        It must be called once for each unit, in the order of the model's. Raises `CheckpointError` if a file was
        written to.
        """
        while not self._arrived.issuperset(unit.owners):
            next(self._steps)
        self._source.check()
        return {name: (self._stored if name in self.model.packed else self._values).pop(name) for name in unit.owners}

    def adopt(self, name: str, dtype: torch.dtype, path: Path, first: int) -> int:
        """All elements must be `put`."""
        return self.model.state[name].numel()

    def put(self, name: str, tensor: torch.Tensor, first_element: int = 0) -> None:
        """Receive a parameter, or consecutive elements of it."""
        like = self.model.state[name]
        if tensor.numel() == like.numel():
            self._values[name] = tensor.reshape(like.shape)
            return
        if name not in self._values:
            self._values[name] = torch.empty(like.shape, dtype=tensor.dtype)
        self._values[name].view(-1)[first_element : first_element + tensor.numel()].copy_(tensor.reshape(-1))

    def put_packed(self, name: str, source: str, tensor: torch.Tensor) -> None:
        """Receive a part of a packed parameter."""
        whole = self.model.packed[name]
        if name not in self._stored:
            self._stored[name] = torch.zeros(whole.num_bytes, dtype=torch.uint8)
        first, stored = whole.first_byte(source), tensor.contiguous().reshape(-1).view(torch.uint8)
        self._stored[name][first : first + len(stored)] = stored

    def put_buffer(self, name: str, tensor: torch.Tensor) -> None:
        """Receive a persistent buffer."""
        self.buffers[name] = tensor

    def arrive(self, name: str) -> None:
        """Note that all of a parameter was put."""
        self._arrived.add(name)

    def close(self) -> None:
        """Close the files."""
        steps = self._steps
        if hasattr(steps, "close"):
            steps.close()
        self._source.close()
        self._values.clear()
        self._stored.clear()
