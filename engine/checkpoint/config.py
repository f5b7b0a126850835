"""Reads config.json: a model's family and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.model_class import new_model
from engine.errors import CheckpointError, named, shown
from engine.reading import find_file, read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MAX_BYTES = 16 << 20
_LARGEST = ((("layers", "layer"), 10_000), (("heads", "head", "experts"), 100_000), ("", 100_000_000))
"""The largest values of fields that set the size of loops and tables, by the end of the field's name. Larger values are
mistakes, and building such a model would not end."""
_COUNTS = ("_size", "_dim", "_heads", "_layers", "_embd", "_experts", "_head", "_layer", "_inner")
WINDOW_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "vocab_size")
"""Fields that may not be 0: a model's tables would have no rows or columns, and families build such a model without an
error."""


def read_config(path: Path) -> dict[str, Any]:
    """The model's config.json; `CheckpointError` when there is none, or when its fields cannot be meant."""
    file = path / "config.json"
    if not find_file(file, CheckpointError):
        raise CheckpointError(f"{path} has no config.json; it is not a Hugging Face model directory")
    return read_config_file(file)


def read_config_file(file: Path) -> dict[str, Any]:
    """A config.json under any name; `CheckpointError` when its fields cannot be meant."""
    config = read_json_object(file, CheckpointError, limit=_MAX_BYTES)
    if "model_type" not in config:
        raise CheckpointError(f"{file} names no model_type; it is not a Hugging Face model")
    _expect(file, config, "model_type", str)
    for key in ("architectures", "quantization_config", "text_config", "dtype", "torch_dtype"):
        kind = list if key == "architectures" else str if key.endswith("dtype") else dict
        if config.get(key) is not None:
            _expect(file, config, key, kind)
    if not all(isinstance(name, str) for name in config.get("architectures") or ()):
        raise CheckpointError(f"{file}: architectures is {shown(config['architectures'])}; names are expected there")
    for part in (config, config.get("text_config") or {}):
        _check_numbers(file, part)
        _check_ropes(file, part)
    return config


def _expect(file: Path, config: Mapping[str, Any], key: str, kind: type) -> None:
    words: dict[type, str] = {str: "a text", dict: "an object", list: "a list"}
    if not isinstance(config[key], kind):
        raise CheckpointError(f"{file}: {key} is {shown(config[key])}; {words[kind]} is expected there")


def _check_numbers(file: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for sizes that no model can have."""
    for key, value in config.items():
        is_count = key.startswith(("num_", "n_")) or key.endswith(_COUNTS)
        largest = next(most for end, most in _LARGEST if key.endswith(end))
        if is_count and key not in WINDOW_KEYS and isinstance(value, int | float) and not -largest <= value <= largest:
            raise CheckpointError(f"{file}: {key} is {shown(value)}; at most {largest:,} is expected there")
    told = [key for key in _LAYER_KEYS if key in config]
    widths = [key for key in _WIDTH_KEYS if config.get(key) is not None]
    for key in [*([key for key in told if config[key] is not None] or told), *widths]:
        value = config[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{file}: {key} is {shown(value)}; a whole number of at least 1 is expected there")


def _check_ropes(file: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for rotary tables of an unknown kind: families warn of it and compute another kind."""
    for rope in ropes(config):
        for key in ("rope_type", "type"):
            if not isinstance(rope.get(key), str | None):
                raise CheckpointError(f"{file}: {key} is {shown(rope[key])}; a text is expected there")


def ropes(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rotary parameters of a text config: one entry for all layers, or one for each kind of layer."""
    told = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(told, Mapping):
        return []
    each = [part for part in told.values() if isinstance(part, Mapping)]
    return each or [told]


def num_layers(config: Mapping[str, Any]) -> int:
    """The number of decoder layers in a config.json; 0 where it leaves that to the family's default."""
    text = text_config(config)
    return next((int(text[key]) for key in _LAYER_KEYS if text.get(key) is not None), 0)


def count_of(config: PreTrainedConfig, *keys: str) -> int:
    """The first of these fields that is a number of at least 1 (the largest one of a list); 0 if there is none.

    A field that the family does not know may hold anything; it is ignored.
    """
    for key in keys:
        told = getattr(config, key, None)
        numbers = [each for each in (told if isinstance(told, list | tuple) else [told]) if type(each) is int]
        if numbers and max(numbers) >= 1:
            return max(numbers)
    return 0


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model (the whole config, unless the model is multimodal)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def load_family_config(path: Path) -> PreTrainedConfig:
    """The language model's part of config.json as `transformers` reads it; `CheckpointError` where it cannot."""
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
        text = config.get_text_config()
    except Exception as error:  # whatever fields of another kind lead to in the family's code
        raise CheckpointError(f"{path / 'config.json'} is invalid: transformers says {named(error)}") from None
    _check_padding(path / "config.json", config, text)
    return text


def _check_padding(file: Path, config: PreTrainedConfig, text: PreTrainedConfig) -> None:
    """Raise `CheckpointError` for a padding token beyond the vocabulary, if the family's embedding needs a row for it.

    Other families run with such a token. Which families need the row shows when the model is built on the meta device.
    """
    padding, vocabulary = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if not isinstance(padding, int) or not isinstance(vocabulary, int) or padding < vocabulary:
        return
    import torch

    try:
        with torch.device("meta"):
            new_model(config)
    except Exception as error:  # what else cannot be built is told when the model is opened
        if "padding_idx" in str(error).lower():
            raise CheckpointError(
                f"{file}: pad_token_id is {padding}, and the vocabulary ends at {vocabulary - 1}; transformers "
                f"cannot build {type(config).__name__} so; give a token of the vocabulary"
            ) from None
