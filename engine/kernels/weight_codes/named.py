"""The weight codec for a policy's compress-weight."""

from __future__ import annotations

from engine.kernels.codec import Codec
from engine.kernels.weight_codes.groups import GroupCodes
from engine.kernels.weight_codes.lossless import Lossless
from engine.kernels.weight_codes.weight_codec import WeightCodec
from engine.policy import WeightCodes


def weight_codec_of(codes: WeightCodes, plain: frozenset[str] = frozenset()) -> WeightCodec | None:
    """The codec of weights; `plain` are parameters that a lossless codec does not encode."""
    if codes is None:
        return None
    return Lossless(plain) if codes == "lossless" else GroupCodes(Codec(codes))
