"""Whether a cache codec takes what layers keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from engine.cache.shape import KVShape
from engine.errors import UnsupportedError
from engine.kernels.codec import GROUP


def check_encodable(shapes: Sequence[KVShape], dtype: torch.dtype, index_dtypes: Mapping[int, torch.dtype]) -> None:
    """Raise `UnsupportedError` where keys and values of `dtype`, or index keys of a layer's own, cannot be encoded."""
    for layer, wide in index_dtypes.items():
        if wide.itemsize > dtype.itemsize:
            raise UnsupportedError(
                f"compress-cache: index keys of layer {layer} are {wide} where the model is {dtype}, and no codes hold "
                "both; leave it out"
            )
    if (at := unencodable_layer(shapes)) is not None:
        raise UnsupportedError(
            f"compress-cache: keys and values of layer {at} are {shapes[at].width} numbers a token, no multiple of "
            f"{GROUP}; leave it out"
        )


def unencodable_layer(shapes: Sequence[KVShape]) -> int | None:
    """The first layer whose keys and values no codec takes; None if there is none."""
    return next((layer for layer, shape in enumerate(shapes) if shape.width % GROUP), None)
