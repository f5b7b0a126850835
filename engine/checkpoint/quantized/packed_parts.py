"""Finds the packed matrices of a quantized checkpoint, or says why it cannot be run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType

import torch
from torch import nn
from transformers.core_model_loading import dot_natural_key

from engine.checkpoint.names import CheckpointNames
from engine.checkpoint.quantized.experts import Piece, stacked
from engine.checkpoint.quantized.method import Kind, Load, Method, Told
from engine.checkpoint.quantized.methods import METHODS, checked_method, cure
from engine.checkpoint.tensors import tensors
from engine.errors import CheckpointError, UnsupportedError, named, one_line
from engine.kernels.packed.matrix import PLAIN, PartForm, type_name
from engine.kernels.packed.parameter import PackedParameter
from engine.kernels.rounded_inputs import InputRounding


def find_packed(
    path: Path, quantization: Told, owners: Mapping[str, nn.Module], names: CheckpointNames
) -> dict[str, PackedParameter]:
    """The packed parameters of a model directory, by name; reads headers, and a few bytes of some tensors.

    Where the checkpoint rounds the inputs of linear layers, the layers are changed to do so.

    quantization: what the model directory declares. owners: the modules of parameters that may be packed, by parameter.
    Raises `UnsupportedError` for a format, or a use of it, that cannot be run, `CheckpointError` for missing experts.
    """
    name = checked_method(path, quantization)
    return _Finder(path, name, METHODS[name], quantization, owners, names).found()


@dataclass(frozen=True)
class _Finder:
    path: Path
    name: str
    method: Method
    told: Told
    owners: Mapping[str, nn.Module]
    names: CheckpointNames

    @property
    def _tables(self) -> type[nn.Linear] | UnionType:
        """The classes of modules whose weight may be one packed matrix."""
        return nn.Linear | nn.Embedding if self.method.has_embedding else nn.Linear

    def found(self) -> dict[str, PackedParameter]:
        """All packed parameters, by name."""
        by_module: dict[str, dict[str, Load]] = {}
        cut = self.method.cut or _cut
        for name, load in sorted(tensors(self.path), key=lambda entry: dot_natural_key(entry[0])):
            if place := cut(name):
                by_module.setdefault(place[0], {})[place[1]] = load
        found: dict[str, PackedParameter] = {}
        pieces: dict[str, list[Piece]] = {}
        rounding = self.method.rounding(self.told)
        for module, loads in by_module.items():
            source = module if self.method.cut else f"{module}.weight"
            target, pattern = self.names.target(source)
            if not self.names.has(target):
                continue  # of layers that the model does not have, e.g. for predicting several tokens
            owner = self.owners.get(target)
            try:
                kind = self.method.kind(self.told, loads, owner is not None and not isinstance(owner, nn.Linear))
                if kind is None:
                    continue
                if isinstance(owner, self._tables) and pattern is None:
                    found[target] = self._linear(kind, module, loads, owner, rounding)
                elif owner is None or not self._may_be_experts(kind, owner, target, pattern):
                    self._refuse_place(module, owner)
                elif pattern is not None:
                    forms = kind.forms(loads)
                    others = _others(module, loads, forms)
                    pieces.setdefault(target, []).append(Piece(pattern, module, kind, forms, others))
                else:
                    found[target] = self._at_once(kind, module, loads, owner, target)
            except (UnsupportedError, CheckpointError):
                raise
            except Exception as error:  # whatever fields and shapes of another kind lead to
                self._refuse(module, error)
        for target, members in pieces.items():
            shape = _parameter(self.owners[target], target).shape
            try:
                found[target] = stacked(members, self.names.converter_of[members[0].pattern], shape)
            except CheckpointError as error:
                raise CheckpointError(f"{self.path}: {target}: {error}") from None
            except Exception as error:
                self._refuse(target, error)
        if not found:
            raise UnsupportedError(
                f"{self.path} is quantized by {self.name} by its configuration, but holds no such tensors; they do not "
                "belong together: fetch the model again"
            )
        return found

    def _may_be_experts(self, kind: Kind, owner: nn.Module, target: str, pattern: str | None) -> bool:
        """Whether a parameter can be stacked experts: not an embedding, a norm or a transposed matrix."""
        is_stack = _parameter(owner, target).ndim == 3
        return kind.is_for_experts and is_stack and (pattern is not None or self.method.cut is not None)

    def _linear(
        self,
        kind: Kind,
        module: str,
        loads: dict[str, Load],
        owner: nn.Linear | nn.Embedding,
        rounding: InputRounding | None,
    ) -> PackedParameter:
        scale = None
        if rounding is not None and rounding.is_static:
            if "input_scale" not in loads:
                raise ValueError("input_scale is missing")
            scale = loads.pop("input_scale")()
            if scale.dtype not in PLAIN:
                raise ValueError(f"input_scale is {type_name(scale.dtype)}, no plain numbers")
        forms = kind.forms(loads)
        matrix = kind.make(owner.weight.shape, forms)
        if rounding is not None and isinstance(owner, nn.Linear):
            rounding.attach(owner, scale)
        sources = [{name: f"{module}.{name}" for name in forms}]
        return PackedParameter(matrix, sources, unread=_others(module, loads, forms))

    def _at_once(self, kind: Kind, name: str, loads: dict[str, Load], owner: nn.Module, target: str) -> PackedParameter:
        """Experts `[experts, columns, rows]` whose parts are one tensor `[experts, ...]` each."""
        count, columns, rows = _parameter(owner, target).shape
        whole = kind.forms(loads)
        for part, form in whole.items():
            if form.shape[:1] != (count,):
                raise ValueError(f"{part} is {list(form.shape)}, and there are {count} experts")
        forms = {part: PartForm(form.dtype, form.shape[1:]) for part, form in whole.items()}
        sources = {part: f"{name}_{part}" for part in forms}
        matrix = kind.make(torch.Size((rows, columns)), forms)
        return PackedParameter(matrix, [sources], is_transposed=True, count=count)

    def _refuse_place(self, module: str, owner: nn.Module | None) -> None:
        where = f"{module} ({type(owner).__name__})" if owner is not None else module
        raise UnsupportedError(
            f"{self.path}: {where} is quantized by {self.name}; only linear layers of the decoder, the head and merged "
            f"experts can be; {cure()}"
        )

    def _refuse(self, where: str, error: Exception) -> None:
        reason = one_line(error) if isinstance(error, ValueError) else named(error)
        raise UnsupportedError(f"{self.path}: {where} is quantized by {self.name}: {reason}; {cure()}") from None


def _others(module: str, loads: Mapping[str, Load], forms: Mapping[str, PartForm]) -> frozenset[str]:
    """The names of a module's tensors that are neither parts of its matrix nor its bias."""
    return frozenset(f"{module}.{name}" for name in loads if name not in forms and name != "bias")


def _parameter(owner: nn.Module, target: str) -> torch.Tensor:
    return owner.get_parameter(target.rpartition(".")[2])


def _cut(name: str) -> tuple[str, str]:
    """Split a tensor's name into module and rest; the rest of bitsandbytes names contains dots."""
    head, dot, tail = name.rpartition(".weight.")
    return (head, f"weight.{tail}") if dot else (name.rpartition(".")[0], name.rpartition(".")[2])
