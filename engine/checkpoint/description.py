"""What can be known of a model without reading its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint.config import check_causal, read_config, text_config
from engine.checkpoint.hub import resolve
from engine.checkpoint.side_files import TOKENIZER_FILES
from engine.checkpoint.weight_files import checked_weight_bytes
from engine.checkpoint.window import window_of
from engine.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What can be known of a model without reading its weights."""

    path: str
    """Local directory."""
    model_type: str
    """As in its config.json, e.g. "opt"."""
    window: int | None
    """Most positions of a sequence; None when the model sets no limit."""
    dtype: str
    """The checkpoint's, e.g. "float16"."""
    weight_bytes: int
    """Size of the weight files' tensors."""
    num_layers: int


def describe(model: str, *, download_weights: bool = True) -> ModelDescription:
    """Check that `model` can be run, as far as that shows without reading weights, and describe it.

    Without `download_weights`, the weights of a hub id are neither fetched nor looked at (`weight_bytes` is 0).
    Raises `CheckpointError` for a directory that is missing, without tokenizer, without weights or with a truncated
    shard; `UnsupportedError` for a model that is not a causal language model.
    """
    path = resolve(model, download_weights=download_weights)
    config = read_config(path)
    check_causal(path, config)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{path} has no tokenizer (none of {', '.join(TOKENIZER_FILES)})")
    is_local = Path(model).expanduser().is_dir()
    weight_bytes = checked_weight_bytes(path) if download_weights or is_local else 0
    text = text_config(config)
    layers = next((text[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in text), 0)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32")
    return ModelDescription(
        path=str(path),
        model_type=str(config["model_type"]),
        window=window_of(config),
        dtype=dtype.removeprefix("torch."),
        weight_bytes=weight_bytes,
        num_layers=int(layers),
    )
