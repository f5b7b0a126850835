"""config.json: what a model's family and sizes are, and whether it is a causal language model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, UnsupportedError, one_line


def read_config(path: Path) -> dict[str, Any]:
    """The model's config.json; `CheckpointError` when there is none."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no config.json; it is not a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {one_line(error)}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(f"{file} names no model_type; it is not a Hugging Face model")
    return config


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model (all of it, unless the model is multimodal)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def check_causal(path: Path, config: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` unless the model is a causal language model by its config.json."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type, architectures = config["model_type"], list(config.get("architectures") or [])
    named = architectures[0] if architectures else model_type
    if config.get("is_encoder_decoder"):
        raise UnsupportedError(f"{named} in {path} is an encoder-decoder; only causal (decoder-only) models run here")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedError(f"{named} in {path} is no causal language model that this transformers version knows")
    causal = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _names(names)}
    # Encoder families (BERT, RoBERTa, …) have a causal class too, meant for configs that say is_decoder.
    bare_decoder = all(name.endswith("Model") for name in architectures) and not _is_encoder_family(model_type)
    if not bare_decoder and not (causal & set(architectures) and not _encoder_without_decoder(config)):
        raise UnsupportedError(f"{named} in {path} is not a causal language model; only decoder-only models run here")


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _is_encoder_family(model_type: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _encoder_without_decoder(config: Mapping[str, Any]) -> bool:
    return _is_encoder_family(config["model_type"]) and not config.get("is_decoder", False)
