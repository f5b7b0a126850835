"""What a model's configuration switches on that its small copy does not do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from engine.checkpoint.model_class import new_model
from engine.errors import named
from flexgen_helm.checking.shrinking import kinds_of_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LIMITS = ("window", "window_size", "chunk_size", "original_max_position_embeddings")
"""Ends of the names of settings that act only on longer prompts."""


def left_out(full: PreTrainedConfig, small: PreTrainedConfig, longest: int) -> list[str]:
    """What `full` enables that a model of `small` does not do with prompts of at most `longest` tokens."""
    found = []
    kinds, kept = (kinds_of_layers(_text(config)) for config in (full, small))
    for key, values in kinds.items():
        missing = {*values} - {*kept.get(key, values)}
        found += [f"the copy has no layer whose {key} is {value}" for value in sorted(map(str, missing))]
    try:
        large, little = _module_kinds(full), _module_kinds(small)
    except Exception as error:  # at full size something is missing that shrinking gave it
        found.append(f"the modules of the full-size model could not be compared ({named(error)})")
    else:
        found += [f"the copy has no {kind}" for kind in sorted(large - little)]
    for key, value in _settings(_text(small)):
        if key.endswith(_LIMITS) and isinstance(value, int) and value >= longest:
            found.append(f"no prompt of the check reaches {key} {value} ({longest} tokens at most)")
    return found


def _text(config: PreTrainedConfig) -> dict[str, Any]:
    settings: dict[str, Any] = config.get_text_config().to_dict()
    return settings


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every setting, nested ones too."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _settings(value)
        else:
            yield str(key), value


def _module_kinds(config: PreTrainedConfig) -> set[str]:
    import torch

    with torch.device("meta"):
        return {type(module).__name__ for module in new_model(config).modules()}
