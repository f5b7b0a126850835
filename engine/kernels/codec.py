"""Group-wise codes of 4 or 8 bits: 64 consecutive numbers share a step and a least value (docs/adr/0004)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.kernels.fused import Fused
from engine.memory.layout import align

GROUP = 64
"""Numbers that share a step and a least value, as in FlexGen."""


@dataclass(frozen=True)
class Codec:
    """Encodes flat tensors as bytes, and back.

    A number becomes the nearest of `2**bits` values, `step` apart, of which the lowest is not above the group's least
    and the highest not below its greatest. So it comes back within `step / 2` (and the rounding of its dtype), where a
    step is `(greatest - least) / (2**bits - 1)`, larger by the rounding of step and least to the dtype. Groups that
    hold a NaN or an infinity come back as NaN.

    For numbers of less than 99 % of the dtype's range only: beyond, steps overflow, and infinities come back.

    Layout of n numbers, each part aligned as parameters are: codes, steps, leasts. Of 4 bits, a byte holds a number of
    the group's first half in its low bits and one of the second half in its high bits.
    """

    bits: int

    @property
    def levels(self) -> int:
        """The highest code."""
        return int(2**self.bits - 1)

    def code_bytes(self, num_elements: int) -> int:
        """Bytes of the codes of so many numbers, a multiple of `GROUP`."""
        assert num_elements % GROUP == 0
        return num_elements * self.bits // 8

    def part_bytes(self, num_elements: int, dtype: torch.dtype) -> tuple[int, int]:
        """Aligned bytes of the codes, and of the steps (or the leasts)."""
        return align(self.code_bytes(num_elements)), align(num_elements // GROUP * dtype.itemsize)

    def num_bytes(self, num_elements: int, dtype: torch.dtype) -> int:
        """Bytes of so many numbers of `dtype`, encoded."""
        codes, steps = self.part_bytes(num_elements, dtype)
        return codes + 2 * steps

    def encode(self, values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes uint8, steps and leasts of `dtype`, of flat `values`, whose number is a multiple of `GROUP`."""
        codes, steps, leasts = _encode(values.to(dtype).view(-1, GROUP), self.bits)
        return codes.flatten(), steps, leasts

    def ranges(
        self, first_element: int, num_elements: int, whole_elements: int, dtype: torch.dtype
    ) -> list[tuple[int, int]]:
        """Where codes, steps and leasts of some numbers of `dtype` lie in the bytes of all that are encoded together.

        first_element, num_elements: multiples of `GROUP`.
        """
        code_bytes, step_bytes = self.part_bytes(whole_elements, dtype)
        first, end = (at // GROUP * dtype.itemsize for at in (first_element, first_element + num_elements))
        codes = self.code_bytes(first_element), self.code_bytes(first_element + num_elements)
        return [codes, *((begin + first, begin + end) for begin in (code_bytes, code_bytes + step_bytes))]

    def decode(self, coded: torch.Tensor, values: torch.Tensor) -> None:
        """Write the numbers of `coded` bytes into flat `values`."""
        count = values.numel()
        self.decode_parts([coded[first:end] for first, end in self.ranges(0, count, count, values.dtype)], values)

    def decode_parts(self, parts: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        """Write the numbers of codes, steps and leasts, which are bytes that lie as `ranges` says, into `values`."""
        steps, leasts = (part.view(values.dtype) for part in parts[1:])
        _fill(values.view(-1, GROUP), parts[0].view(len(steps), -1), steps, leasts, self.bits)

    def row_bytes(self, width: int, dtype: torch.dtype) -> int:
        """Bytes of a row of `width` numbers of `dtype`, a multiple of `GROUP`, encoded by `encode_rows`."""
        return self.code_bytes(width) + 2 * (width // GROUP) * dtype.itemsize

    def encode_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Bytes `[count, row_bytes]` of rows `[count, width]`: each row's codes, steps and leasts are together."""
        # A single row would be compiled for anew, in the midst of the last sequence's last step: it has a double, which
        # must lie in memory as several rows do.
        several = rows if len(rows) > 1 else rows.repeat(2, 1)
        parts = _encode_fast(several.unflatten(1, (-1, GROUP)), self.bits)
        return torch.cat([part.flatten(1).view(torch.uint8) for part in parts], dim=1)[: len(rows)]

    def decode_rows(self, coded: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        """The rows `[count, width]` of `dtype` of `coded` bytes `[count, row_bytes]`."""
        rows = torch.empty(len(coded), width // GROUP, GROUP, dtype=dtype, device=coded.device)
        code_bytes, groups = self.code_bytes(width), width // GROUP
        first = code_bytes // dtype.itemsize
        numbers = coded.view(dtype)  # [count, …]: the codes, too, which are not looked at so
        steps, leasts = numbers[:, first : first + groups], numbers[:, first + groups : first + 2 * groups]
        _fill(rows, coded[:, :code_bytes].unflatten(1, (groups, -1)), steps, leasts, self.bits)
        return rows.flatten(1)


def _encode(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 `[…, bytes]`, steps and leasts `[…]` of `groups` `[…, GROUP]`, in its dtype."""
    levels, dtype, groups = 2**bits - 1, groups.dtype, groups.float()
    least, greatest = groups.aminmax(dim=-1)
    leasts = _rounded(least, dtype, -1)
    steps = _rounded((greatest - leasts.float()) / levels, dtype, 1)
    # A step of 0 means a group of equal numbers, all of code 0.
    scaled = (groups - leasts.float()[..., None]) / steps.float().where(steps > 0, torch.inf)[..., None]
    codes = scaled.round().clamp(0, levels).nan_to_num(0).to(torch.uint8)
    if bits == 4:
        codes = codes[..., : GROUP // 2] | (codes[..., GROUP // 2 :] << 4)
    return codes, steps, leasts


_encode_fast = Fused(_encode)


def _decode_into(
    groups: torch.Tensor, codes: torch.Tensor, steps: torch.Tensor, leasts: torch.Tensor, bits: int
) -> torch.Tensor:
    """Fill `groups` `[…, GROUP]` with the numbers of codes uint8 `[…, bytes]`, steps and leasts `[…]`."""
    if bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), dim=-1)
    return torch.addcmul(leasts[..., None], groups.copy_(codes), steps[..., None], out=groups)


def _decode_kernel() -> Callable[..., torch.Tensor]:
    from engine.kernels.decode_kernel import decode_into  # needs Triton

    return decode_into


_fill = Fused(_decode_into, _decode_kernel)


def codec_of(bits: int | None) -> Codec | None:
    """The codec that a policy's compress-weight or compress-cache means."""
    return Codec(bits) if bits else None


def _rounded(values: torch.Tensor, dtype: torch.dtype, direction: int) -> torch.Tensor:
    """Numbers of `dtype` that are not below (direction 1) or not above (-1) float32 `values`, about the nearest."""
    limits = torch.finfo(dtype)
    nearest = values.to(dtype)
    beyond = values + direction * (values.abs() * limits.eps + limits.smallest_normal * limits.eps)
    wrong = (nearest.float() - values) * direction < 0
    return torch.where(wrong, beyond.to(dtype), nearest)
