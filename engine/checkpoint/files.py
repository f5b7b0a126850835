"""Checkpoint directories: where they are, whether they are whole, and their tensors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_WINDOW_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


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


def resolve(model: str, *, download_weights: bool = True) -> Path:
    """Return the local directory of `model`, a directory or a hub id (downloaded on first use)."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"model {model!r} is a file; name the directory that holds config.json and the weights")
    if str(model).startswith((".", "/", "~")) or str(model).count("/") != 1:
        raise CheckpointError(f"model directory {model!r} does not exist")
    return _download(model, weights=download_weights)


def _download(model: str, *, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    side = ["*.json", "*.jinja", "*.model", "*.txt"]
    try:
        try:
            files = HfApi().list_repo_files(model)
        except OSError:  # no network: what the cache has must do
            return Path(snapshot_download(model, local_files_only=True))
        if not weights:
            return Path(snapshot_download(model, allow_patterns=side))
        kind = "*.safetensors" if any(name.endswith(".safetensors") for name in files) else "*.bin"
        return Path(snapshot_download(model, allow_patterns=[*side, kind]))
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"model {model!r} is neither a directory nor in the local hub cache, and the hub cannot be reached; "
            "name a directory, or download it where there is a network"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"model {model!r} cannot be had from the hub: {_one_line(error)}") from None


def read_config(path: Path) -> dict[str, Any]:
    """The model's config.json; `CheckpointError` when there is none."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no config.json; it is not a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {_one_line(error)}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(f"{file} names no model_type; it is not a Hugging Face model")
    return config


def describe(model: str, *, download_weights: bool = True) -> ModelDescription:
    """Check that `model` can be run, as far as that shows without reading weights, and describe it.

    Without `download_weights`, the weights of a hub id are neither fetched nor looked at (`weight_bytes` is 0).
    Raises `CheckpointError` for a directory that is missing, without tokenizer, without weights or with a truncated
    shard; `UnsupportedError` for a model that is not a causal language model.
    """
    path = resolve(model, download_weights=download_weights)
    config = read_config(path)
    _check_causal(path, config)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{path} has no tokenizer (none of {', '.join(TOKENIZER_FILES)})")
    is_local = Path(model).expanduser().is_dir()
    weight_bytes = _checked_weight_bytes(path) if download_weights or is_local else 0
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


def window_of(config: Mapping[str, Any]) -> int | None:
    """Most positions of a sequence by a config.json; None when it sets no limit."""
    text = text_config(config)
    window = next((text[key] for key in _WINDOW_KEYS if isinstance(text.get(key), int)), None)
    return _without_switching(window, text) if window is not None and window < 10**9 else None


def _without_switching(window: int, text: Mapping[str, Any]) -> int:
    """The window up to which rotary tables do not depend on the longest sequence in the call.

    LongRoPE (Phi-3's long variants) takes other tables for all sequences of a call as soon as one is longer than the
    original window: a result would depend on its company.
    """
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) not in ("longrope", "su"):
        return window
    original = text.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return min(window, int(original)) if original else window


def _checked_weight_bytes(path: Path) -> int:
    """Size of the weights; raises `CheckpointError` when files are missing or truncated."""
    files = weight_files(path)
    if files[0].suffix != ".safetensors":
        return sum(file.stat().st_size for file in files)
    headers = [read_safetensors_header(file) for file in files]
    _check_index(path, {name for header in headers for name in header})
    return sum(t["data_offsets"][1] - t["data_offsets"][0] for header in headers for t in header.values())


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model (all of it, unless the model is multimodal)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def _check_causal(path: Path, config: Mapping[str, Any]) -> None:
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


def weight_files(path: Path) -> list[Path]:
    """The weight files of a directory: safetensors if there are any, else `.bin`; complete by their index."""
    for pattern, index_name in (
        ("*.safetensors", "model.safetensors.index.json"),
        ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ):
        index = path / index_name
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} cannot be read: {_one_line(error)}") from None
            missing = [name for name in names if not (path / name).is_file()]
            if missing:
                raise CheckpointError(f"{path} lacks {len(missing)} of {len(names)} weight files, e.g. {missing[0]}")
            return [path / name for name in names]
        files = sorted(path.glob(pattern))
        if files:
            return files
    raise CheckpointError(f"{path} has no weights (no *.safetensors, no pytorch_model*.bin)")


def read_safetensors_header(file: Path) -> dict[str, Any]:
    """Tensor entries of a safetensors header (format of the safetensors README); checks the file's length."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{file} is truncated: {size} bytes cannot hold its header; fetch it again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise CheckpointError(f"{file} is damaged: its safetensors header makes no sense; fetch it again") from None
    if size != expected:
        raise CheckpointError(f"{file} is truncated: {size} bytes instead of {expected}; fetch it again")
    return header


def _check_index(path: Path, present: set[str]) -> None:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if missing := sorted(listed - present):
            raise CheckpointError(
                f"{path}: its index lists {len(missing)} tensors that its shards lack, e.g. {missing[0]}; "
                "fetch it again"
            )


def tensors(path: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Yield (name, load) for every tensor of a directory; `load()` maps the file, so it costs no anonymous memory.

    `.bin` files are opened by `torch.load(weights_only=True, mmap=True)` only, never as an open pickle.
    """
    for file in weight_files(path):
        if file.suffix == ".safetensors":
            yield from _safetensors(file)
        else:
            yield from _bin(file)


def tensor_places(path: Path) -> dict[str, tuple[Path, int]]:
    """File and first byte of every tensor that lies in a safetensors file, row by row, as their format has it."""
    places: dict[str, tuple[Path, int]] = {}
    for file in weight_files(path):
        if file.suffix == ".safetensors":
            header = read_safetensors_header(file)
            ends = {name: entry["data_offsets"] for name, entry in header.items()}
            data = file.stat().st_size - max((end for _, end in ends.values()), default=0)
            places.update({name: (file, data + first) for name, (first, _) in ends.items()})
    return places


def _safetensors(file: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    from safetensors import SafetensorError, safe_open

    read_safetensors_header(file)
    try:
        handle: Any = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {_one_line(error)}; fetch it again") from None
    for name in handle.keys():  # noqa: SIM118 - not a mapping
        yield name, lambda name=name: handle.get_tensor(name)  # type: ignore[misc]


def _bin(file: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{file} holds more than tensors, and loading it could run code: torch refuses it with weights_only; "
            "convert it to safetensors with a program that you trust, or take a safetensors checkpoint"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be mapped: {_one_line(error)}; fetch it again") from None
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            yield name, lambda tensor=tensor: tensor  # type: ignore[misc]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
