"""Which codec a policy's compress-weight means."""

from __future__ import annotations

from engine.kernels.codec import Codec
from engine.kernels.weight_codes.groups import GroupCodes
from engine.kernels.weight_codes.lossless import Lossless
from engine.kernels.weight_codes.weight_codec import WeightCodec
from engine.policy import WeightCodes


def weight_codec_of(codes: WeightCodes, plain: frozenset[str] = frozenset()) -> WeightCodec | None:
    """The codec of weights; `plain` are parameters that a lossless one leaves as they are."""
    if codes is None:
        return None
    return Lossless(plain) if codes == "lossless" else GroupCodes(Codec(codes))
