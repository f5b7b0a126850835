"""Matrices in the formats of bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from engine.kernels.packed.matrix import PackedMatrix, PartForm, Parts, chunks

QUANT_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
"""Tensors that hold JSON with the parameters of a 4-bit matrix."""


class FourBitBlocks(PackedMatrix):
    """bitsandbytes' 4 bits (NF4, FP4): codes of a table, and the absolute maximum of each block, coded or not."""

    names = ("weight", "weight.absmax", "weight.quant_map")
    optional = ("weight.nested_absmax", "weight.nested_quant_map")
    unread = QUANT_STATES

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm], state: bytes) -> None:
        """state: the JSON of the checkpoint's quant_state."""
        super().__init__(shape, parts)
        told = json.loads(state)
        self._block, self._nested_block = int(told["blocksize"]), int(told.get("nested_blocksize") or 1)
        self._offset = float(told.get("nested_offset") or 0.0)
        self._dtype: torch.dtype = getattr(torch, told["dtype"])
        count = shape.numel()
        if (
            list(told["shape"]) != list(shape)
            or parts["weight"].shape.numel() * parts["weight"].dtype.itemsize * 2 != count
        ):
            raise ValueError(f"quant_state describes {told['shape']}, the layer has {list(shape)}")
        if count % self._block:
            raise ValueError(f"{count} numbers are no multiple of blocks of {self._block}")
        if ("weight.nested_absmax" in parts) != ("weight.nested_quant_map" in parts):
            raise ValueError("one of nested_absmax and nested_quant_map is missing")

    def _fill(self, parts: Parts, matrix: torch.Tensor) -> None:
        values, largest = matrix.view(-1), parts["weight.absmax"]
        if "weight.nested_absmax" in parts:
            nested = parts["weight.nested_absmax"].repeat_interleave(self._nested_block)[: len(largest)]
            largest = parts["weight.nested_quant_map"][largest.int()] * nested + self._offset
        codes, table = parts["weight"].flatten().view(torch.uint8), parts["weight.quant_map"]
        for blocks in chunks(len(values) // self._block, self._block):
            first, end = blocks.start * self._block, blocks.stop * self._block
            piece = codes[first // 2 : end // 2].int()
            numbers = table[torch.stack([piece >> 4, piece & 15], dim=1).flatten()].view(-1, self._block)
            values[first:end].copy_((numbers * largest[blocks, None]).to(self._dtype).flatten())


class EightBitRows(PackedMatrix):
    """bitsandbytes' 8 bits (LLM.int8): int8, and the absolute maximum of each row."""

    names = ("weight", "SCB")
    unread = ("weight_format",)

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm]) -> None:
        super().__init__(shape, parts)
        self._expect_plain("SCB")
        self._expect({"weight": (self.rows, self.columns), "SCB": (self.rows,)})

    def _fill(self, parts: Parts, matrix: torch.Tensor) -> None:
        for rows in chunks(self.rows, self.columns):  # 1 / 127, as bitsandbytes rounds it
            matrix[rows].copy_(parts["weight"][rows] * parts["SCB"][rows, None] * 7.874015718698502e-3)
