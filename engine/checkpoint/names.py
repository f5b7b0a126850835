"""Maps the tensor names of a checkpoint to a model's parameters, by `transformers`' own conversion mapping."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

_HALVES = ("language_model.", "model.language_model.")
"""The prefixes of a language model's parameters in a multimodal checkpoint, whose config may be the text half's."""


class CheckpointNames:
    """The names that a checkpoint's tensors get in a model, and which tensors are converted on the way."""

    def __init__(self, module: PreTrainedModel, state: dict[str, Any]) -> None:
        """state: the model's parameters and persistent buffers, by name."""
        transforms = get_model_conversion_mapping(module)
        self._state = state
        self._found: dict[str, tuple[str, str | None]] = {}
        """Results of earlier look-ups: there are many conversion patterns, and many experts."""
        self._prefix = module.base_model_prefix
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self.converter_of: dict[str, WeightConverter] = {
            pattern: converter for converter in self._converters for pattern in converter.source_patterns
        }

    def target(self, name: str) -> tuple[str, str | None]:
        """The model's name for `name`, in its state or not, and the pattern of the converter that makes it, if any."""
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def has(self, target: str) -> bool:
        """Whether the model has a parameter or persistent buffer of this name."""
        return target in self._state

    def _find(self, name: str) -> tuple[str, str | None]:
        target, pattern = self._renamed(name)
        if target in self._state:
            return target, pattern
        if name in self._state:
            return name, None
        inner = (self._renamed(name.removeprefix(half)) for half in _HALVES if name.startswith(half))
        return next((found for found in inner if found[0] in self._state), (target, pattern))

    def _renamed(self, name: str) -> tuple[str, str | None]:
        return rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
