"""The interface of a quantization method of checkpoints."""

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
"""Memory-maps a tensor of the checkpoint without reading it."""
Loads = Mapping[str, Load]
"""The tensors of a module, by their names in it."""


@dataclass(frozen=True)
class Kind:
    """A format of packed matrices."""

    form: type[PackedMatrix]
    settings: Mapping[str, Any]
    """Keyword arguments for the constructor of the format."""
    is_for_experts: bool = True
    """Whether experts may be stored in it, too."""

    @classmethod
    def of(cls, form: type[PackedMatrix], **settings: Any) -> Kind:
        """A format for both linear layers and experts."""
        return cls(form, settings)

    def forms(self, loads: Loads) -> dict[str, PartForm]:
        """The module's tensors that are parts of its matrix; `ValueError` where one is missing, or not understood."""
        form = self.form
        known = {*form.names, *form.optional, *form.unread, "bias"}
        if missing := [name for name in form.names if name not in loads]:
            raise ValueError(f"{missing[0]} is missing")
        if strange := sorted(loads.keys() - known):
            raise ValueError(f"it has a {strange[0]}, which is not understood")
        return {name: form_of(loads[name]) for name in (*form.names, *form.optional) if name in loads}

    def make(self, shape: torch.Size, parts: Mapping[str, PartForm]) -> PackedMatrix:
        """Build the matrix; raises `ValueError` for parts that do not form one."""
        return self.form(shape, parts, **self.settings)


def _no_rounding(told: Told) -> InputRounding | None:
    return None


def _nothing(told: Told, has_experts: bool) -> str | None:
    return None


@dataclass(frozen=True)
class Method:
    """One quantization method of checkpoints."""

    problem: Callable[[Told], str | None]
    """Why a config's settings cannot be run, in words; None if they can."""
    kind: Callable[[Told, Loads, bool], Kind | None]
    """The format of a module with these tensors, for experts or not; None if it is not quantized. Raises
    `ValueError`."""
    rounding: Callable[[Told], InputRounding | None] = _no_rounding
    """How inputs of its linear layers are rounded."""
    unrounded: Callable[[Told, bool], str | None] = _nothing
    """What the format rounds in addition to weights and the engine does not, for a model with experts or without, in
    words; None if nothing."""
    cut: Callable[[str], tuple[str, str] | None] | None = None
    """Splits a tensor's name into the parameter's and the part's, where it is not "module.part"; None: no such
    names."""
    has_embedding: bool = False
    """Whether the token embedding may be packed, too."""


def form_of(load: Load) -> PartForm:
    """The dtype and shape of a checkpoint tensor."""
    tensor = load()
    return PartForm(tensor.dtype, tensor.shape)


def strange(holder: Told, known: Iterable[str]) -> str | None:
    """The first field with a value that is neither supported nor without effect here; None if there is none."""
    known = {*known}
    found = next((key for key, value in holder.items() if value and key not in known), None)
    return None if found is None else f"the field {shown(found)}"
