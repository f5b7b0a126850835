"""The accuracy of codecs: `python -m benchmarks.codecs` - the engine's, and bitsandbytes' if it is installed.

Gaussian numbers are encoded and decoded in blocks of 64: the relative error (of the norm), bits per number, and the
seconds that the CPU takes each way.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.kernels.codec import GROUP, Codec
from flexgen_helm.planning.record import write_record

ROOT = Path(__file__).resolve().parent.parent
Codecs = dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor], float]]
"""Name -> (encode, decode, bits per number)."""


def ours(dtype: torch.dtype) -> Codecs:
    """The engine's codecs, on rows of one group each."""

    def codec(bits: int) -> tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor], float]:
        made = Codec(bits)
        return (
            lambda values: made.encode_rows(values.view(-1, GROUP)),
            lambda coded: made.decode_rows(coded, GROUP, dtype).flatten(),
            made.row_bytes(GROUP) * 8 / GROUP,
        )

    return {f"engine, {bits} bits": codec(bits) for bits in (4, 8)}


def theirs() -> Codecs:
    """Bitsandbytes' NF4 and 8-bit blockwise codes, with a float32 scale per block; empty if it is not installed."""
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        return {}
    scale_bits = 32 / GROUP
    return {
        "bitsandbytes, NF4": (
            lambda values: bnb.quantize_4bit(values, blocksize=GROUP, quant_type="nf4"),
            lambda coded: bnb.dequantize_4bit(*coded).flatten(),
            4 + scale_bits,
        ),
        "bitsandbytes, 8 bits": (
            lambda values: bnb.quantize_blockwise(values, blocksize=GROUP),
            lambda coded: bnb.dequantize_blockwise(*coded),
            8 + scale_bits,
        ),
    }


def main() -> None:
    """Encode, decode, compare; print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1 << 24, help="numbers")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    dtype = torch.float16
    values = (torch.randn(options.count, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    rows = {}
    for name, (encode, decode, bits) in {**ours(dtype), **theirs()}.items():
        decode(encode(values))  # loads kernels
        start = time.perf_counter()
        coded = encode(values)
        middle = time.perf_counter()
        back = decode(coded)
        end = time.perf_counter()
        error = float((back.float() - values.float()).norm() / values.float().norm())
        rows[name] = {"bits": bits, "relative_error": error, "encode_s": middle - start, "decode_s": end - middle}
        print(
            f"{name:22} {bits:4.1f} bits  error {error:.4f}  encode {middle - start:.3f} s  decode {end - middle:.3f} s"
        )
    print(write_record("codecs", {"numbers": options.count, "dtype": "float16", "codecs": rows}, options.out))


if __name__ == "__main__":
    main()
