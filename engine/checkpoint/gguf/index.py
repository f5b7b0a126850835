"""An index of the tensors of a GGUF file by the model's parameter names, stored in the model directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import CheckpointError, one_line
from engine.reading import MAX_JSON_BYTES, read_json_object

if TYPE_CHECKING:
    import torch

GGUF_FILE = "model.gguf"
GGUF_INDEX = "gguf_tensors.json"
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The torch dtypes of ggml's unquantized types."""


@dataclass(frozen=True)
class Place:
    """A tensor of a GGUF file."""

    type: str
    """The ggml type of its numbers: one of `PLAIN`, or a block type (`FORMS`)."""
    shape: tuple[int, ...]
    """The shape of the model's parameter."""
    first: int
    """Its first byte in the file."""
    num_bytes: int
    """Its size in the file."""
    heads: int = 0
    """The number of heads whose rows the file stores with the two halves interleaved; 0 where rows are in the model's
    order."""


def index_of(places: Mapping[str, Place]) -> dict[str, Any]:
    """The content of the index file for the tensors by parameter name."""
    return {"tensors": {name: asdict(place) for name, place in places.items()}}


def read_index(file: Path) -> dict[str, Place]:
    """Read the index of a model directory's GGUF file, by parameter name; `CheckpointError` where it has none."""
    index = file.parent / GGUF_INDEX
    told = read_json_object(index, CheckpointError, limit=MAX_JSON_BYTES).get("tensors")
    try:
        return {name: Place(**{**entry, "shape": tuple(entry["shape"])}) for name, entry in told.items()}  # type: ignore[union-attr]
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(
            f"{index} is no index of a GGUF file; remove {file.parent}, and it is made again"
        ) from None


def gguf_tensors(file: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Yield (name, load) for every tensor of a GGUF file, as views of one memory mapping.

    Unquantized tensors have the parameter's name; for quantized ones, the block type replaces "weight" in the name.
    """
    import torch

    places = read_index(file)
    try:
        storage: Any = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{file} cannot be read: {one_line(error)}; fetch it again") from None
    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
    for name, place in places.items():
        known = name if place.type in PLAIN else f"{name.rpartition('.')[0]}.{place.type.lower()}"
        yield known, lambda place=place: _view(whole, place)  # type: ignore[misc]


def plain_places(file: Path) -> dict[str, tuple[Path, int]]:
    """The file and first byte of every unquantized tensor whose rows are stored in the model's order."""
    places = read_index(file)
    return {name: (file, place.first) for name, place in places.items() if place.type in PLAIN and not place.heads}


def _view(whole: torch.Tensor, place: Place) -> torch.Tensor:
    import torch

    from engine.kernels.packed.ggml_blocks import FORMS

    raw = whole[place.first : place.first + place.num_bytes]
    if (kind := PLAIN.get(place.type)) is not None:
        return _in_order(raw.view(getattr(torch, kind)).view(place.shape), place).reshape(place.shape)
    rows = raw.view(*place.shape[:-1], -1, FORMS[place.type].num_bytes)
    return _in_order(rows, place)


def _in_order(rows: torch.Tensor, place: Place) -> torch.Tensor:
    """Reorder rows as the model has them: GGUF files interleave the two halves of a head's rows."""
    return rows.unflatten(0, (place.heads, -1, 2)).transpose(1, 2) if place.heads else rows
