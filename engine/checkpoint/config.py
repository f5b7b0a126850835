"""config.json: what a model's family and sizes are."""

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
"""Of what a model is built from in loops and tables, by the key's end: more is a slip, and building would not end."""
_COUNTS = ("_size", "_dim", "_heads", "_layers", "_embd", "_experts", "_head", "_layer", "_inner")
WINDOW_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "vocab_size")
"""No table of the model has rows or columns where one of these is 0: families build such a model without a word."""


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
    """Raise `CheckpointError` for sizes that no model has."""
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
    """Raise `CheckpointError` for rotary tables whose kind is no name: families warn of it, and compute others."""
    for rope in ropes(config):
        for key in ("rope_type", "type"):
            if not isinstance(rope.get(key), str | None):
                raise CheckpointError(f"{file}: {key} is {shown(rope[key])}; a text is expected there")


def ropes(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How rotary tables are made by a text config: one way for all layers, or one for each kind of layer."""
    told = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(told, Mapping):
        return []
    each = [part for part in told.values() if isinstance(part, Mapping)]
    return each or [told]


def num_layers(config: Mapping[str, Any]) -> int:
    """Decoder layers by a config.json; 0 where it leaves that to the family."""
    text = text_config(config)
    return next((int(text[key]) for key in _LAYER_KEYS if text.get(key) is not None), 0)


def count_of(config: PreTrainedConfig, *keys: str) -> int:
    """The first of these fields that is a number of at least 1, the largest where it has one a layer; 0 if none is.

    A field that the family does not know may hold anything, and means nothing.
    """
    for key in keys:
        told = getattr(config, key, None)
        numbers = [each for each in (told if isinstance(told, list | tuple) else [told]) if type(each) is int]
        if numbers and max(numbers) >= 1:
            return max(numbers)
    return 0


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model (all of it, unless the model is multimodal)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def load_family_config(path: Path) -> PreTrainedConfig:
    """The language model's part of config.json as `transformers` reads it; `CheckpointError` where it cannot."""
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
        text = config.get_text_config()
        if not hasattr(text, "get_text_config"):
            raise TypeError(f"a {type(config).__name__} has no text_config")
    except Exception as error:  # whatever fields of another kind lead to in the family's code
        raise CheckpointError(f"{path / 'config.json'} cannot be meant: transformers says {named(error)}") from None
    _check_padding(path / "config.json", config, text)
    return text


def _check_padding(file: Path, config: PreTrainedConfig, text: PreTrainedConfig) -> None:
    """Raise `CheckpointError` for a padding token beyond the vocabulary, in families whose embedding has a row for it.

    The others run with one. Which is which is known by building the model, without memory for its parameters.
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
