"""A packed parameter of the model: the layout of its parts in stored bytes, and their decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.kernels.packed.matrix import PackedMatrix
from engine.memory.layout import Extent, lay_out


@dataclass(frozen=True)
class Part:
    """One tensor of the checkpoint."""

    name: str
    """The part's name in the format."""
    first: int
    """The first of the matrices that it belongs to."""
    count: int
    """The number of matrices that it belongs to."""


class PackedParameter:
    """The matrix of a linear layer, or of experts: matrices of one format and shape, joined by rows or transposed.

    Stored bytes are the parts one after the other, aligned: of each part first that of the first matrix, then that of
    the second, and so on.
    """

    def __init__(
        self,
        matrix: PackedMatrix,
        sources: Sequence[Mapping[str, str]],
        *,
        is_transposed: bool = False,
        count: int | None = None,
        unread: frozenset[str] = frozenset(),
    ) -> None:
        """sources: for each matrix the names of its parts in the checkpoint, or, with `count`, for all of them at once.

        is_transposed: the parameter is `[matrices, columns, rows]`. unread: names of tensors that belong to it and
        affect nothing.
        """
        self.matrix, self.is_transposed, self.unread = matrix, is_transposed, unread
        self.num_matrices = len(sources) if count is None else count
        each = self.num_matrices // len(sources)
        self.parts: dict[str, Part] = {
            source: Part(name, index * each, each)
            for index, named in enumerate(sources)
            for name, source in named.items()
        }
        """The parts by their names in the checkpoint."""
        sizes = {name: form.num_bytes * self.num_matrices for name, form in matrix.parts.items()}
        extents, self.num_bytes = lay_out(sizes)
        self._extents: dict[str, Extent] = {extent.name: extent for extent in extents}

    def first_byte(self, source: str) -> int:
        """The first byte of a checkpoint tensor in the stored bytes."""
        part = self.parts[source]
        return self._extents[part.name].first + part.first * self.matrix.parts[part.name].num_bytes

    def numbers(self, tensors: Mapping[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Decode the checkpoint's tensors, given by name, to numbers in the shape and dtype of `like`."""
        memory = torch.zeros(self.num_bytes, dtype=torch.uint8)
        for source, tensor in tensors.items():
            stored, first = tensor.contiguous().reshape(-1).view(torch.uint8), self.first_byte(source)
            memory[first : first + len(stored)] = stored
        values = torch.empty(like.shape, dtype=like.dtype)
        self.decode(memory, values.view(-1))
        return values

    def ranges(self, first_element: int, num_elements: int) -> list[tuple[int, int]]:
        """The ranges, in the stored bytes, of the parts of consecutive numbers, which must be whole matrices."""
        size = self.matrix.rows * self.matrix.columns
        first, count = first_element // size, num_elements // size
        begins = [(self._extents[name].first, form.num_bytes) for name, form in self.matrix.parts.items()]
        return [(begin + first * each, begin + (first + count) * each) for begin, each in begins]

    def decode(self, stored: torch.Tensor, values: torch.Tensor) -> None:
        """Decode `stored` bytes, of the whole parameter, into flat `values`."""
        self.decode_parts([stored[first:end] for first, end in self.ranges(0, values.numel())], values)

    def decode_parts(self, parts: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        """Decode some matrices, whose stored bytes are given as `ranges` returns them, into flat `values`."""
        rows, columns = self.matrix.rows, self.matrix.columns
        count = values.numel() // (rows * columns)
        named = zip(self.matrix.parts.items(), parts, strict=True)
        tensors = {name: part.view(form.dtype).view(count, *form.shape) for (name, form), part in named}
        if self.is_transposed:
            self.matrix.fill(tensors, values.view(count, columns, rows).transpose(1, 2))
        else:
            self.matrix.fill(tensors, values.view(count, rows, columns))
