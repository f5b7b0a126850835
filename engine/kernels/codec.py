"""Group-wise codes of 4 or 8 bits: 64 consecutive numbers are rotated, and share a scale (docs/adr/0029)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from engine.kernels.fused import Fused
from engine.kernels.invariant.mode import plain_arithmetic
from engine.memory.layout import align

GROUP = 64
"""The number of values that are rotated together and share a scale."""
QUARTER = 16
"""The number of values of a group that share a multiple of its scale."""
MULTIPLES = 16
"""The multiples of a group's scale are 1 to 16: four bits each."""
BEND = 28
"""With 4 bits, the code of the odd number u has the value u times (28 + |u|): levels are finer near 0, where most
numbers are."""
SCALE_BYTES = 2
"""The bytes of a group's scale (a bfloat16), which is also the bytes of its four multiples."""
_HOST_CHUNK, _CHUNK = 1 << 12, 1 << 16
"""The most groups that torch's operations take at once: few on the host, so that they stay in its caches."""


@dataclass(frozen=True)
class Codec:
    """Encodes flat tensors as bytes, and back.

    A group is multiplied by the Hadamard matrix of 64 rows, divided by 8, which is its own inverse and spreads outliers
    over the group. Each number of the product is coded as the nearest of `2**bits` levels. Level `c` is
    `scale * multiple * u` of 8 bits and `scale * multiple * u * (BEND + |u|)` of 4, where `u = 2 * c - levels`; a scale
    belongs to the group and a multiple to a quarter of it. To decode, levels are multiplied by the same matrix. All
    sums there are of whole numbers below 2**24, hence exact in whatever order: everyone who decodes gets the same.

    So a group comes back within `bound` of itself, in the length of the vector, and within the rounding of its dtype.
    Groups that hold a NaN or an infinity come back without any finite number. For numbers of less than a 64th (float16:
    half) of the dtype's range only, and more than 1e-32: a group of smaller ones comes back as zeros.

    Layout of n numbers, each part aligned as parameters are: codes, scales (bfloat16), multiples. Of 4 bits, a byte
    holds a number of the group's first half in its low bits and one of the second half in its high bits; so do the two
    bytes of a group's multiples, each less 1, for even and odd quarters.
    """

    bits: int

    @property
    def levels(self) -> int:
        """The highest code."""
        return int(2**self.bits - 1)

    def code_bytes(self, num_elements: int) -> int:
        """The number of bytes of the codes of so many numbers, a multiple of `GROUP`."""
        assert num_elements % GROUP == 0
        return num_elements * self.bits // 8

    def part_bytes(self, num_elements: int) -> tuple[int, int]:
        """The aligned number of bytes of the codes, and of the scales (or the multiples)."""
        return align(self.code_bytes(num_elements)), align(num_elements // GROUP * SCALE_BYTES)

    def num_bytes(self, num_elements: int) -> int:
        """The number of bytes of so many numbers, encoded."""
        codes, scales = self.part_bytes(num_elements)
        return codes + 2 * scales

    def encode(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode flat `values`, whose number is a multiple of `GROUP`, to the bytes of codes, scales and multiples."""
        codes, scales, multiples = _encode_fast(values.view(-1, GROUP), self.bits)
        return codes.flatten(), scales.flatten(), multiples.flatten()

    def ranges(self, first_element: int, num_elements: int, whole_elements: int) -> list[tuple[int, int]]:
        """The byte ranges of codes, scales and multiples of some numbers within those that were encoded together.

        first_element, num_elements: multiples of `GROUP`.
        """
        code_bytes, scale_bytes = self.part_bytes(whole_elements)
        first, end = (at // GROUP * SCALE_BYTES for at in (first_element, first_element + num_elements))
        codes = self.code_bytes(first_element), self.code_bytes(first_element + num_elements)
        return [codes, *((begin + first, begin + end) for begin in (code_bytes, code_bytes + scale_bytes))]

    def decode(self, coded: torch.Tensor, values: torch.Tensor) -> None:
        """Decode `coded` bytes into flat `values`."""
        count = values.numel()
        self.decode_parts([coded[first:end] for first, end in self.ranges(0, count, count)], values)

    def decode_parts(self, parts: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        """Decode codes, scales and multiples, given as the byte ranges that `ranges` returns, into flat `values`."""
        groups = values.view(-1, GROUP)
        codes, scales, multiples = (part.view(len(groups), -1) for part in parts)
        _fill(groups, codes, scales, multiples, self.bits)

    def row_bytes(self, width: int) -> int:
        """The number of bytes of a row of `width` numbers, a multiple of `GROUP`, encoded by `encode_rows`."""
        return self.code_bytes(width) + 2 * (width // GROUP) * SCALE_BYTES

    def encode_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Encode rows `[count, width]` to bytes `[count, row_bytes]`: each row's codes, then scales, then multiples."""
        parts = _encode_fast(rows.unflatten(1, (-1, GROUP)), self.bits)
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def decode_rows(self, coded: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Decode bytes `[count, row_bytes]` to rows `[count, width]` of `dtype`."""
        groups = width // GROUP
        rows = torch.empty(len(coded), groups, GROUP, dtype=dtype, device=coded.device)
        sizes = self.code_bytes(width), groups * SCALE_BYTES, groups * SCALE_BYTES
        codes, scales, multiples = (part.unflatten(1, (groups, -1)) for part in coded.split(sizes, dim=1))
        _fill(rows, codes, scales, multiples, self.bits)
        return rows.flatten(1)

    def bound(self, groups: torch.Tensor) -> torch.Tensor:
        """The largest Euclidean error of decoded `groups` `[…, GROUP]`: the length of the difference vector, `[…]`.

        It leaves out the rounding to their dtype.
        """
        largest = _quarters(groups).abs().amax(dim=-1)
        top = _level(self.levels, self.bits)
        scale = largest.amax(dim=-1, keepdim=True) / (top * MULTIPLES) * (1 + 2**-8)
        # A multiple that covers a quarter is too large by less than 1; the levels farthest out are farthest apart.
        half_gap = (top - _level(self.levels - 2, self.bits)) / 2 * (largest / top + scale)
        return torch.maximum(half_gap, largest * 2**-8).square().sum(dim=-1).mul(QUARTER).sqrt()


def _level(odd: int, bits: int) -> int:
    """The value of the code of an odd number, in units of its scale's multiple."""
    return odd * (BEND + abs(odd)) if bits == 4 else odd


def rotated(groups: torch.Tensor) -> torch.Tensor:
    """Float32 `groups` `[…, GROUP]` times the Hadamard matrix over 8, summed in a fixed order."""
    half = GROUP // 2
    while half:
        pairs = groups.unflatten(-1, (-1, 2, half))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        groups = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        half //= 2
    return groups / 8


@cache
def _hadamard(device: torch.device) -> torch.Tensor:
    """The matrix that `rotated` multiplies by, times 8."""
    return rotated(torch.eye(GROUP, device=device)) * 8


def _quarters(groups: torch.Tensor) -> torch.Tensor:
    """Rotated `groups` `[…, GROUP]` as float32 `[…, 4, QUARTER]`."""
    quarters: torch.Tensor = rotated(groups.float()).unflatten(-1, (-1, QUARTER))
    return quarters


def _odd(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """The odd numbers whose levels are nearest to `numbers`, given in units of a scale's multiple."""
    size = numbers.abs()
    if bits == 4:  # The middle between the levels of u - 1 and u + 1, for an even u, is u * (BEND + u) + 1.
        size = ((size - 1).clamp(min=0) + BEND**2 / 4).sqrt() - BEND / 2
    odd = (size / 2).floor().clamp(0, 2 ** (bits - 1) - 1) * 2 + 1
    return torch.where(numbers < 0, -odd, odd)


def _encode(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode `groups` `[…, GROUP]` to bytes `[…, bytes of a group]` of codes, scales and multiples."""
    with plain_arithmetic():  # one group by itself
        found = [_encode_some(part, bits) for part in groups.split(_at_once(groups))]
    codes, scales, multiples = (parts[0] if len(found) == 1 else torch.cat(parts) for parts in zip(*found, strict=True))
    return codes, scales, multiples


def _at_once(groups: torch.Tensor) -> int:
    """The number of rows of `groups` to take at a time."""
    most = _HOST_CHUNK if groups.device.type == "cpu" else _CHUNK
    return max(1, most * len(groups) * GROUP // max(1, groups.numel()))


def _encode_some(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    quarters, levels = _quarters(groups), 2**bits - 1
    top, tiny = _level(levels, bits), torch.finfo(torch.float32).smallest_normal
    largest = quarters.abs().amax(dim=-1)
    scales = (largest.amax(dim=-1, keepdim=True) / (top * MULTIPLES)).bfloat16()
    scales = torch.where(scales < tiny, 0, scales)  # which some devices take for nothing
    scale = scales.float()
    whole = 1 / scale.where(scale != 0, torch.inf)  # numbers times it are in units of the scale
    nearest = (largest * whole / top + 0.5).floor()
    odd, multiples, least = quarters, largest, largest
    for change in (0, -1, 1):
        tried = (nearest + change).clamp(1, MULTIPLES)
        found = _odd(quarters * (whole / tried)[..., None], bits)
        reached = found * (found.abs() + BEND) if bits == 4 else found
        error = (quarters - reached * (tried * scale)[..., None]).square()
        while error.shape[-1] > 1:  # in the same order, whatever else is encoded
            error = error[..., : error.shape[-1] // 2] + error[..., error.shape[-1] // 2 :]
        error = error[..., 0]
        better = (error < least) if change else torch.ones_like(error, dtype=torch.bool)
        odd, multiples = torch.where(better[..., None], found, odd), torch.where(better, tried, multiples)
        least = torch.where(better, error, least)
    codes = _bytes((odd + levels).flatten(-2) / 2)
    if bits == 4:
        codes = codes[..., : GROUP // 2] | (codes[..., GROUP // 2 :] << 4)
    fours = _bytes(multiples - 1)
    return codes, scales.view(torch.uint8), fours[..., ::2] | (fours[..., 1::2] << 4)


def _bytes(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.nan_to_num(0).to(torch.uint8)


def _encode_kernel() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    from engine.kernels.encode_kernel import encode  # needs Triton

    return partial(encode, bend=BEND)


_encode_fast = Fused(_encode, _encode_kernel)


def _decode_into(
    groups: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, multiples: torch.Tensor, bits: int
) -> torch.Tensor:
    """Decode codes, scales and multiples, bytes `[…, bytes of a group]`, into `groups` `[…, GROUP]`."""
    parts = (each.split(_at_once(groups)) for each in (groups, codes, scales, multiples))
    with plain_arithmetic():  # sums are exact
        for group, code, scale, fours in zip(*parts, strict=True):
            _decode_some(group, code, scale, fours, bits)
    return groups


def _decode_some(
    groups: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, multiples: torch.Tensor, bits: int
) -> None:
    if bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), dim=-1)
    odd = codes.float().mul_(2).sub_(2**bits - 1)
    if bits == 4:
        odd = odd.mul_(odd.abs().add_(BEND))
    fours = torch.stack((multiples & 15, multiples >> 4), dim=-1).flatten(-2) + 1
    whole = odd.unflatten(-1, (-1, QUARTER)).mul_(fours[..., None]).flatten(-2) @ _hadamard(groups.device)
    groups.copy_(whole.mul_(scales.view(torch.bfloat16).float() / 8))


def _decode_kernel() -> Callable[..., torch.Tensor]:
    from engine.kernels.decode_kernel import decode_into  # needs Triton

    return partial(decode_into, bend=BEND)


_fill = Fused(_decode_into, _decode_kernel)


def codec_of(bits: int | None) -> Codec | None:
    """The codec for a value of the policy's compress-weight or compress-cache."""
    return Codec(bits) if bits else None
