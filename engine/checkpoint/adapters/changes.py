"""The changes that a LoRA adapter makes to the parameters of its base model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.checkpoint.adapters.declared import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LoraConfig,
    adapter_folder,
    read_lora_config,
)
from engine.checkpoint.names import CheckpointNames
from engine.checkpoint.tensors import tensors_of
from engine.errors import CheckpointError, UnsupportedError

_PREFIX = "base_model.model."
"""The prefix of all tensor names in an adapter's weight file."""
_DOWN, _UP, _BASE = ".lora_A.weight", ".lora_B.weight", ".base_layer.weight"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Load = Callable[[], torch.Tensor]


@dataclass(kw_only=True)
class Change:
    """The change of one parameter: replaced values, an added product of two matrices, or both."""

    replaced: Load | None = None
    """The values that replace the base model's."""
    down: Load | None = None
    """The first matrix of the product, `[rank, inputs]`."""
    up: Load | None = None
    """The second matrix of the product, `[outputs, rank]`."""
    scale: float = 1.0
    is_transposed: bool = False
    """Whether the parameter is `[inputs, outputs]`."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors that the change reads, memory-mapped."""
        return [load() for load in (self.replaced, self.down, self.up) if load is not None]

    def delta(self) -> torch.Tensor | None:
        """float32, as peft's `get_delta_weight` has it: it widens an adapter of 16 bits when it is loaded."""
        if self.down is None or self.up is None:
            return None
        product = self.up().float() @ self.down().float()
        return (product.T if self.is_transposed else product) * self.scale

    def apply(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The base model's `values` changed, in `dtype`: the sum is computed in float32 and rounded once."""
        delta = self.delta()
        base = values if self.replaced is None else self.replaced()
        merged = base.to(dtype, copy=True)
        return merged if delta is None else merged.add_(delta)


def changes_of(
    path: Path,
    names: CheckpointNames,
    state: Mapping[str, torch.Tensor],
    owners: Mapping[str, nn.Module],
    *,
    tied: Iterable[str],
    packed: Iterable[str],
) -> dict[str, Change]:
    """The changes that the adapter of a model directory makes, by parameter name of the model; empty without one.

    owners: the modules that hold parameters. tied: parameters that share memory. packed: parameters whose values are
    quantized. Raises `CheckpointError` for an adapter that does not fit, `UnsupportedError` for one that cannot be
    merged.
    """
    folder = adapter_folder(path)
    if folder is None:
        return {}
    config, weights = (
        file.readlink() if file.is_symlink() else file  # what the user knows
        for file in (folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS)
    )
    lora = read_lora_config(config)
    return _Fitting(weights, lora, names, state, owners, frozenset(tied), frozenset(packed)).changes()


@dataclass(frozen=True)
class _Fitting:
    file: Path
    config: LoraConfig
    names: CheckpointNames
    state: Mapping[str, torch.Tensor]
    owners: Mapping[str, nn.Module]
    tied: frozenset[str]
    packed: frozenset[str]

    def changes(self) -> dict[str, Change]:
        """The changes by parameter name of the model."""
        found: dict[str, Change] = {}
        module_of: dict[str, str] = {}
        for name, load in tensors_of(self.file):
            if load().dtype not in _DTYPES:
                self._refuse(f"{name} is {str(load().dtype).removeprefix('torch.')}, and plain numbers are expected")
            inner = name.removeprefix(_PREFIX)
            end = next((each for each in (_DOWN, _UP, _BASE) if inner.endswith(each)), None)
            module = inner.removesuffix(end) if end else inner.rpartition(".")[0]
            if inner == name or not (self.config.changes(module) if end else self.config.replaces(module)):
                self._refuse(f"{name} is none of what its target_modules and modules_to_save name")
            target = self._target(f"{module}.weight" if end else inner, name)
            change = found.setdefault(target, Change())
            module_of[target] = module
            if end == _DOWN:
                change.down = load
            elif end == _UP:
                change.up = load
            else:
                change.replaced = load
        for target, change in found.items():
            self._complete(target, module_of[target], change)
        self._check_whole(found)
        return found

    def _target(self, base_name: str, name: str) -> str:
        """The model's parameter that an adapter's tensor changes, by its name in the base model's checkpoint."""
        target, pattern = self.names.target(base_name)
        if pattern is not None:
            self._refuse(f"{name} is of an expert, and experts are merged into one parameter here")
        if target in self.tied:
            self._refuse(f"{name} is of the head or token embedding, and both are one table in the base model")
        if target not in self.owners:
            raise CheckpointError(
                f"{self.file}: {name} has no counterpart in the base model; the adapter was made for "
                f"another than {self.config.base}: correct base_model_name_or_path"
            )
        if target in self.packed:
            raise UnsupportedError(
                f"{self.file.with_name(ADAPTER_CONFIG)}: its base model {self.config.base} is quantized, and "
                "nothing can be added to packed matrices; name the unquantized model as base_model_name_or_path"
            )
        return target

    def _complete(self, target: str, module: str, change: Change) -> None:
        """Set scale and layout; refuse a tensor that does not fit the parameter."""
        shape, owner = list(self.state[target].shape), self.owners[target]
        if change.replaced is not None:
            self._expect(target, list(change.replaced().shape), shape)
        if change.down is None and change.up is None:
            return
        if change.down is None or change.up is None:
            missing = _DOWN if change.down is None else _UP
            raise CheckpointError(f"{self.file} lacks {_PREFIX}{module}{missing}; fetch it again")
        if not isinstance(owner, nn.Linear | Conv1D):
            self._refuse(f"{module} is a {type(owner).__name__}; linear layers can be changed")
        change.is_transposed = isinstance(owner, Conv1D)
        change.scale = self.config.scale_of(module)
        outputs, inputs = reversed(shape) if change.is_transposed else shape
        rank = self.config.rank_of(module)
        self._expect(f"{module}{_DOWN}", list(change.down().shape), [rank, inputs])
        self._expect(f"{module}{_UP}", list(change.up().shape), [outputs, rank])

    def _expect(self, name: str, found: list[int], expected: list[int]) -> None:
        if found != expected:
            raise CheckpointError(
                f"{self.file}: {name} is {found} instead of {expected}; the adapter was made for "
                f"another model than {self.config.base}, or its rank is another: correct base_model_name_or_path"
            )

    def _check_whole(self, found: Mapping[str, Change]) -> None:
        """Raise `CheckpointError` unless the adapter has tensors for everything that its configuration names."""
        named = {name for name, owner in self.owners.items() if self._is_named(name, owner)}
        if missing := sorted(named - found.keys()):
            raise CheckpointError(
                f"{self.file} lacks {len(missing)} of {len(named)} parameters that target_modules and modules_to_save "
                f"name, e.g. {missing[0]}; fetch it again"
            )
        if not found:
            raise CheckpointError(f"{self.file} holds no tensors; fetch it again")

    def _is_named(self, name: str, owner: nn.Module) -> bool:
        module, _, end = name.rpartition(".")
        is_linear = isinstance(owner, nn.Linear | Conv1D) and end == "weight"
        return self.config.replaces(module) or (is_linear and self.config.changes(module))

    def _refuse(self, what: str) -> NoReturn:
        raise UnsupportedError(
            f"{self.file}: {what}; merge the adapter into its base model by peft (merge_and_unload, "
            "save_pretrained), and name that directory"
        )
