"""A description of a model that is made without reading its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.checkpoint.adapters.located import locate
from engine.checkpoint.config import load_family_config, num_layers, read_config, text_config
from engine.checkpoint.model_class import check_causal
from engine.checkpoint.side_files import check_side_files
from engine.checkpoint.weight_files import checked_weight_bytes
from engine.checkpoint.window import longest_window, window_of
from engine.errors import ConfigError, shown


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """The facts about a model that are known without reading its weights."""

    path: str
    """The local directory; for an adapter, a directory of links to its files and to its base model's."""
    tokenizer: str = ""
    """The directory (absolute) or hub id that holds the tokenizer: the base model's for an adapter without one."""
    model_type: str
    """The model type of its config.json, such as "opt"."""
    window: int | None
    """The maximum number of positions of a sequence; None when the model sets no limit."""
    longest_window: int | None = None
    """The largest window that a user may set instead; None when there is no limit."""
    dtype: str
    """The checkpoint's dtype, such as "float16"."""
    weight_bytes: int
    """The total size of the tensors in the weight files."""
    num_layers: int
    vocab_size: int | None = None
    """The number of token ids; None where its config does not say."""


def describe(model: str, *, download_weights: bool = True) -> ModelDescription:
    """Check, without reading weights, that `model` can be run, and describe it.

    Without `download_weights`, the weights of a hub id are neither downloaded nor examined (`weight_bytes` is 0).
    Raises `CheckpointError` for a directory that is missing, without tokenizer, without weights or with a truncated
    shard; `UnsupportedError` for a model that is not a causal language model.
    """
    located = locate(model, download_weights=download_weights)
    path = located.path
    config = read_config(path)
    check_causal(path, config)
    check_side_files(path)
    weight_bytes = checked_weight_bytes(path) if download_weights or located.is_local else 0
    text = text_config(config)
    family = load_family_config(path)
    is_rotary = getattr(family, "rope_parameters", None) is not None
    dtype = str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32")
    return ModelDescription(
        path=str(path),
        tokenizer=located.tokenizer,
        model_type=str(config["model_type"]),
        window=window_of(config),
        longest_window=longest_window(config, is_rotary=is_rotary),
        dtype=dtype.removeprefix("torch."),
        weight_bytes=weight_bytes,
        num_layers=num_layers(config),
        vocab_size=getattr(family, "vocab_size", None),
    )


def with_window(description: ModelDescription, window: int | None) -> ModelDescription:
    """Return the description with another window, or unchanged for None; `ConfigError` for a window that cannot be."""
    if window is None:
        return description
    longest = description.longest_window
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ConfigError(f"window {shown(window)} is not a number of at least 1")
    if longest is not None and window > longest:
        raise ConfigError(
            f"window {window} of {description.path} is more than {longest}, where its positions end or would change "
            f"with the longest sequence of a call; give {longest} or less"
        )
    return replace(description, window=window)
