"""Encodes bfloat16 matrices for `Lossless` on the host's cores, which keep up with a disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from engine.errors import UnsupportedError
from engine.memory.cores import usable_cores

TILE = 2048
"""The numbers of a tile, whose escapes are stored together."""
HALF = TILE // 2
NUM_EXPONENTS = 15
"""The number of exponents that have a code."""
ESCAPE = 15
"""The code of a number whose exponent is not among the 15 commonest of its matrix."""
NUMBERS_PER_ESCAPE = 320
"""A matrix has space for one escape per so many numbers."""
_CHUNK_ELEMENTS = 256 * TILE
"""The numbers that a core encodes at once, within its caches."""
_MOST_CHUNKS = 256
"""The most encoded chunks that wait to be taken, of less than a megabyte each."""
_SAMPLED_PART = 0.5
"""The part of the space for escapes that the escapes of a sample may fill."""

Array = Any
"""A numpy array."""


class Encoder:
    """Threads that encode; a context manager that starts and ends them.

    numpy's functions use one core each, and release the interpreter meanwhile.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(usable_cores(), thread_name_prefix="flexgen-encode")

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def encode(self, name: str, values: torch.Tensor, places: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the stored bytes of a matrix's flat `values`, (position, uint8) per chunk; parts begin at `places`.

        Raises `UnsupportedError`, with `name`, for more escapes than there is space for.
        """
        chunks = values.split(_CHUNK_ELEMENTS)
        table = commonest(self._pool.map(_counts, chunks))
        code_of = np.full(256, ESCAPE, dtype=np.uint8)
        code_of[table] = np.arange(NUM_EXPONENTS, dtype=np.uint8)
        per_tile, found, exponents = [np.zeros(1, dtype=np.int64)], list[Array](), list[Array]()
        at = 0
        for fractions, codes, *escapes in self._few(partial(_coded, code_of), chunks):
            yield places[0] + at, torch.from_numpy(fractions)
            yield places[1] + at // 2, torch.from_numpy(codes)
            at += len(fractions)
            for parts, part in zip((per_tile, found, exponents), escapes, strict=True):
                parts.append(part)
        starts = np.concatenate(per_tile).cumsum().astype(np.int32)
        if starts[-1] > values.numel() // NUMBERS_PER_ESCAPE:
            raise UnsupportedError(
                f"compress-weight: lossless: {name} has {starts[-1]:,} of {values.numel():,} numbers whose exponent is "
                f"none of the 15 commonest, and room for {values.numel() // NUMBERS_PER_ESCAPE:,}; leave "
                "compress-weight out"
            )
        yield places[2], torch.from_numpy(np.append(table, np.uint8(0)))
        for place, part in zip(places[3:], (starts, np.concatenate(found), np.concatenate(exponents)), strict=True):
            yield place, torch.from_numpy(part.view(np.uint8))

    def _few(self, call: Callable[[torch.Tensor], tuple[Array, ...]], chunks: Sequence[torch.Tensor]) -> Iterator[Any]:
        """The results of `call`, computed only a few ahead of the consumer."""
        for first in range(0, len(chunks), _MOST_CHUNKS):
            yield from self._pool.map(call, chunks[first : first + _MOST_CHUNKS])


def is_worth_it(sample: torch.Tensor) -> bool:
    """Whether a matrix from which flat `sample` was taken has clearly few enough escapes."""
    counts = _counts(sample)
    escapes = int(counts.sum() - counts[commonest([counts])].sum())
    return escapes <= _SAMPLED_PART / NUMBERS_PER_ESCAPE * sample.numel()


def commonest(counts: Iterable[Array]) -> Array:
    """The 15 commonest exponents uint8, in order, by how often each of the 256 occurs."""
    order = np.argsort(-np.sum([*counts], axis=0), kind="stable")
    return np.sort(order[:NUM_EXPONENTS]).astype(np.uint8)


def _bits(values: torch.Tensor) -> Array:
    return values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)


def _exponents(bits: Array) -> Array:
    return (bits >> 7).astype(np.uint8)  # which leaves the sign out


def _counts(values: torch.Tensor) -> Array:
    return torch.bincount(torch.from_numpy(_exponents(_bits(values))), minlength=256).numpy()


def _coded(code_of: Array, values: torch.Tensor) -> tuple[Array, ...]:
    """Sign and mantissa, codes, and the escapes' number per tile, positions in their tiles and exponents.

    values: whole tiles; the last may be shorter.
    """
    bits = _bits(values)
    exponents, fractions = _exponents(bits), ((bits & 127) | ((bits >> 8) & 128)).astype(np.uint8)
    codes = code_of.take(exponents)
    found = np.flatnonzero(codes == ESCAPE)
    num_tiles = -(-len(bits) // TILE)
    tiles = np.pad(codes, (0, num_tiles * TILE - len(bits))).reshape(num_tiles, 2, HALF)
    both = (tiles[:, 0] | (tiles[:, 1] << 4)).reshape(-1)
    per_tile = np.bincount(found // TILE, minlength=num_tiles)
    return fractions, both, per_tile, (found % TILE).astype(np.int16), exponents[found]
