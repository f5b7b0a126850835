"""Where a model is: a directory, or a repository of the hub, which is downloaded on first use."""

from __future__ import annotations

from pathlib import Path

from engine.errors import CheckpointError, one_line


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
        raise CheckpointError(f"model {model!r} cannot be had from the hub: {one_line(error)}") from None
