"""What is asked of each way in which checkpoints are quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.errors import shown
from engine.kernels.packed.matrix import PackedMatrix, PartForm
from engine.kernels.rounded_inputs import InputRounding

Told = Mapping[str, Any]
"""A quantization_config."""
Load = Callable[[], torch.Tensor]
"""Maps a tensor of the checkpoint; nothing of it is read."""
Loads = Mapping[str, Load]
"""Of a module's tensors, by their names there."""


@dataclass(frozen=True)
class Kind:
    """A format of packed matrices."""

    form: type[PackedMatrix]
    settings: Mapping[str, Any]
    """Of the format, for its constructor."""
    is_for_experts: bool = True
    """Experts may come in it, too."""

    @classmethod
    def of(cls, form: type[PackedMatrix], **settings: Any) -> Kind:
        """A kind for linear layers and experts."""
        return cls(form, settings)

    def forms(self, loads: Loads) -> dict[str, PartForm]:
        """Those of a module's tensors that are parts; `ValueError` where one is missing, or not understood."""
        form = self.form
        known = {*form.names, *form.optional, *form.unread, "bias"}
        if missing := [name for name in form.names if name not in loads]:
            raise ValueError(f"{missing[0]} is missing")
        if strange := sorted(loads.keys() - known):
            raise ValueError(f"it has a {strange[0]}, which is not understood")
        return {name: form_of(loads[name]) for name in (*form.names, *form.optional) if name in loads}

    def make(self, shape: torch.Size, parts: Mapping[str, PartForm]) -> PackedMatrix:
        """Raises `ValueError` for parts that do not make such a matrix."""
        return self.form(shape, parts, **self.settings)


def _no_rounding(told: Told) -> InputRounding | None:
    return None


def _nothing(told: Told, has_experts: bool) -> str | None:
    return None


@dataclass(frozen=True)
class Method:
    """One way in which checkpoints are quantized."""

    problem: Callable[[Told], str | None]
    """What a config asks for that cannot be run, in words; None if nothing."""
    kind: Callable[[Told, Loads, bool], Kind | None]
    """The format of a module with these tensors, experts' or not; None if it is not quantized. Raises `ValueError`."""
    rounding: Callable[[Told], InputRounding | None] = _no_rounding
    """How inputs of its linear layers are rounded."""
    unrounded: Callable[[Told, bool], str | None] = _nothing
    """What the format rounds besides weights, and is not rounded here, of a model with experts or without; in words."""
    cut: Callable[[str], tuple[str, str] | None] | None = None
    """From a tensor's name to the parameter's and the part's, where that is not "module.part"; None: none."""
    has_embedding: bool = False
    """The token embedding may be packed, too."""


def form_of(load: Load) -> PartForm:
    """What a tensor of the checkpoint is."""
    tensor = load()
    return PartForm(tensor.dtype, tensor.shape)


def strange(holder: Told, known: Iterable[str]) -> str | None:
    """A field that says something, and is none of those whose meaning is honoured, or makes no difference here."""
    known = {*known}
    found = next((key for key, value in holder.items() if value and key not in known), None)
    return None if found is None else f"the field {shown(found)}"
